// SPDX-License-Identifier: Apache-2.0
// The eight AMX tile registers, each 16 rows of 64 bytes. With RAPID3RT_AMX_EMULATED they are plain
// memory, so that the control flow above them runs on any machine with AVX-512 BF16; without a
// configuration, products of emulated tiles are NaN. Macros, because some compilers take nothing
// but a literal as the number of a tile.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace rapid3rt {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

#ifdef RAPID3RT_AMX_EMULATED

struct TileFile {
  bool configured;
  alignas(64) float tiles[8][16][16];
};
thread_local TileFile tile_file;

inline void configure_tiles(const TileConfig& config) {
  tile_file.configured = config.palette == 1;
  for (int i = 0; i < 8; ++i) {
    if (config.rows[i] != 16 || config.row_bytes[i] != 64) tile_file.configured = false;
  }
}

inline void emulate_load(int tile, const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i) {
    const char* const row = static_cast<const char*>(from) + i * stride;
    _mm512_store_ps(tile_file.tiles[tile][i], _mm512_loadu_ps(row));
  }
}

inline void emulate_store(int tile, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) {
    char* const row = static_cast<char*>(to) + i * stride;
    _mm512_storeu_ps(row, _mm512_load_ps(tile_file.tiles[tile][i]));
  }
}

inline void emulate_zero(int tile) {
  for (float* const row : tile_file.tiles[tile]) _mm512_store_ps(row, _mm512_setzero_ps());
}

inline void emulate_product(int sum, int a, int b) {
  for (int i = 0; i < 16; ++i) {
    __m512 total = _mm512_load_ps(tile_file.tiles[sum][i]);
    for (int j = 0; j < 16; ++j) {
      const __m512 left = _mm512_set1_ps(tile_file.tiles[a][i][j]);
      const __m512 right = _mm512_load_ps(tile_file.tiles[b][j]);
      total = _mm512_dpbf16_ps(total, (__m512bh)left, (__m512bh)right);
    }
    if (!tile_file.configured) total = _mm512_set1_ps(__builtin_nanf(""));
    _mm512_store_ps(tile_file.tiles[sum][i], total);
  }
}

#define TILE_CONFIGURE(config) configure_tiles(config)
#define TILE_RELEASE() (tile_file.configured = false)
#define TILE_LOAD(tile, from, stride) emulate_load(tile, from, stride)
#define TILE_STORE(tile, to, stride) emulate_store(tile, to, stride)
#define TILE_ZERO(tile) emulate_zero(tile)
#define TILE_PRODUCT(sum, a, b) emulate_product(sum, a, b)

#else

// GCC's own forms do not say that they read memory: without a barrier, stores to what a tile is
// loaded from may come after the load, or not at all.
inline void finish_stores(const void* from) { __asm__ volatile("" : : "r"(from) : "memory"); }

#define TILE_CONFIGURE(config)   \
  do {                           \
    finish_stores(&(config));    \
    _tile_loadconfig(&(config)); \
  } while (false)
#define TILE_RELEASE() _tile_release()
#define TILE_LOAD(tile, from, stride) \
  do {                                \
    finish_stores(from);              \
    _tile_loadd(tile, from, stride);  \
  } while (false)
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_ZERO(tile) _tile_zero(tile)
// sum[16, 16] += a[16, 32] b[32, 16], b as 16 rows of pairs.
#define TILE_PRODUCT(sum, a, b) _tile_dpbf16ps(sum, a, b)

#endif

}  // namespace
}  // namespace rapid3rt
