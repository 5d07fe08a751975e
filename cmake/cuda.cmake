# SPDX-License-Identifier: Apache-2.0
# The CUDA module. RAPID3RT_CUDA=on builds it, auto builds it where there is an nvcc that works, off
# never; always for every architecture below, or for what CMAKE_CUDA_ARCHITECTURES names. This
# machine's GPUs are not asked: what is built here may run elsewhere. docs/cuda.md has the details.

set(RAPID3RT_CUDA_ALL 80-real 86-real 89-real 90-real 120-real 80-virtual)
set(RAPID3RT_CUDA_OLDEST 12.8) # the first that knows compute capability 12.0

# Where nvcc is, empty if nowhere.
function(rapid3rt_find_nvcc out)
  find_program(
    RAPID3RT_NVCC nvcc
    HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH
    PATHS /usr/local/cuda
    PATH_SUFFIXES bin)
  if(CMAKE_CUDA_COMPILER)
    set(${out} ${CMAKE_CUDA_COMPILER} PARENT_SCOPE)
  elseif(DEFINED ENV{CUDACXX})
    set(${out} $ENV{CUDACXX} PARENT_SCOPE)
  elseif(RAPID3RT_NVCC)
    set(${out} ${RAPID3RT_NVCC} PARENT_SCOPE)
  else()
    set(${out} "" PARENT_SCOPE)
  endif()
endfunction()

# How many compilers may run at once: each may take 4 GB.
function(rapid3rt_jobs out)
  cmake_host_system_information(RESULT jobs QUERY NUMBER_OF_LOGICAL_CORES)
  cmake_host_system_information(RESULT megabytes QUERY TOTAL_PHYSICAL_MEMORY)
  math(EXPR bound "${megabytes} / 4096")
  if(bound LESS jobs)
    set(jobs ${bound})
  endif()
  if(jobs LESS 1)
    set(jobs 1)
  endif()
  set(${out} ${jobs} PARENT_SCOPE)
endfunction()

function(rapid3rt_add_cuda)
  string(REPLACE ";" "," names "${CMAKE_CUDA_ARCHITECTURES}")
  rapid3rt_jobs(jobs)
  message(STATUS "rapid3rt: CUDA module for ${names} with nvcc ${CMAKE_CUDA_COMPILER_VERSION}, "
                 "${jobs} at a time")
  # NO_EXTRAS: what pybind11 adds otherwise, link-time optimisation, is not nvcc's.
  pybind11_add_module(
    _cuda
    MODULE
    NO_EXTRAS
    csrc/cuda/attention/dispatch.cpp
    csrc/cuda/attention/sm80_d128_bf16.cu
    csrc/cuda/attention/sm80_d128_fp16.cu
    csrc/cuda/attention/sm80_d64_bf16.cu
    csrc/cuda/attention/sm80_d64_fp16.cu
    csrc/cuda/lists.cu
    csrc/cuda/lookup.cu
    csrc/cuda/module.cpp
    csrc/cuda/modulate.cu
    csrc/cuda/rows.cu
    csrc/cuda/store.cu)
  target_include_directories(_cuda PRIVATE csrc/include csrc/cuda)
  target_include_directories(_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_definitions(
    _cuda PRIVATE RAPID3RT_CUDA_ARCHITECTURES="${names}" $<$<NOT:$<CONFIG:Debug>>:NDEBUG>)
  target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>
                                       $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall>)
  set_target_properties(
    _cuda
    PROPERTIES CUDA_STANDARD 17
               CUDA_STANDARD_REQUIRED ON
               CUDA_EXTENSIONS OFF
               CUDA_RUNTIME_LIBRARY Static
               CUDA_SEPARABLE_COMPILATION OFF
               CUDA_VISIBILITY_PRESET hidden)
  # Ninja alone would take all cores; other generators build one after another unless told.
  set_property(GLOBAL APPEND PROPERTY JOB_POOLS rapid3rt_cuda=${jobs})
  set_target_properties(_cuda PROPERTIES JOB_POOL_COMPILE rapid3rt_cuda)
  install(TARGETS _cuda LIBRARY DESTINATION rapid3rt)
endfunction()

# The version of a compiler, empty where it does not run.
function(rapid3rt_nvcc_version compiler out)
  execute_process(COMMAND ${compiler} --version OUTPUT_VARIABLE told ERROR_QUIET)
  string(REGEX MATCH "V([0-9]+\\.[0-9]+\\.[0-9]+)" matched "${told}")
  set(${out} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

# Left out: one line, or an error where the module was asked for.
macro(rapid3rt_without_cuda why)
  if(RAPID3RT_CUDA STREQUAL "on")
    message(FATAL_ERROR "rapid3rt: RAPID3RT_CUDA=on, but ${why}")
  endif()
  message(STATUS "rapid3rt: CUDA module left out: ${why}")
  return()
endmacro()

if(NOT RAPID3RT_CUDA MATCHES "^(on|off|auto)$")
  message(FATAL_ERROR "RAPID3RT_CUDA must be on, off or auto, got ${RAPID3RT_CUDA}")
endif()
if(RAPID3RT_CUDA STREQUAL "off")
  return()
endif()

rapid3rt_find_nvcc(RAPID3RT_CUDA_COMPILER)
if(NOT RAPID3RT_CUDA_COMPILER)
  rapid3rt_without_cuda("there is no nvcc on PATH, in CUDACXX, CUDA_HOME, CUDA_PATH or /usr/local/cuda")
endif()
rapid3rt_nvcc_version(${RAPID3RT_CUDA_COMPILER} RAPID3RT_CUDA_VERSION)
if(NOT RAPID3RT_CUDA_VERSION VERSION_GREATER_EQUAL RAPID3RT_CUDA_OLDEST)
  rapid3rt_without_cuda("${RAPID3RT_CUDA_COMPILER} is '${RAPID3RT_CUDA_VERSION}', not 12.8 or newer")
endif()
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES ${RAPID3RT_CUDA_ALL})
endif()
foreach(RAPID3RT_CUDA_NAME IN LISTS CMAKE_CUDA_ARCHITECTURES)
  if(NOT RAPID3RT_CUDA_NAME MATCHES "^[0-9]+[a-z]?(-real|-virtual)?$")
    message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES must be names such as 90-real, got ${RAPID3RT_CUDA_NAME}")
  endif()
endforeach()
if(RAPID3RT_CUDA STREQUAL "auto" AND NOT CMAKE_CUDA_COMPILER)
  # A compiler that was not asked for must not break the build: it may know no such host compiler.
  include(CheckLanguage)
  set(ENV{CUDACXX} ${RAPID3RT_CUDA_COMPILER})
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    rapid3rt_without_cuda("${RAPID3RT_CUDA_COMPILER} does not work, RAPID3RT_CUDA=on shows why")
  endif()
endif()
set(CMAKE_CUDA_COMPILER ${RAPID3RT_CUDA_COMPILER})
enable_language(CUDA)
rapid3rt_add_cuda()
