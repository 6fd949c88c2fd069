// Products of rows with rows, 64 x 64 at a time, for every family that needs many of them. Slabs of both operands
// travel through a ring of cp.async stages in shared memory; 16-bit dot products run on tensor cores (ldmatrix +
// mma.m16n8k16), fp32 and squared differences on CUDA cores in 4 x 4 register blocks. Both engines leave a thread with
// 4 rows x 4 columns, and both add the channels in order, so a product does not depend on the tile it falls in. O(64^2
// C) per tile.
#pragma once

#include "cuda/rows.h"

namespace tokencomp {

struct PairTiles {
  static constexpr int threads = 256;
  static constexpr int tile = 64;        // rows and columns
  static constexpr int row_bytes = 128;  // bytes of a row in one slab: eight 16-byte chunks, one swizzle period
  static constexpr int stages = 4;       // slabs in flight: 48 KB cover L2 latency (about 600 cycles at 64 B each)
};

// The rows or the columns of a tile: `first` and the 63 places after it, taken from `n` places. Place i is row
// index[i] of x, or row i without an index; a row outside [0, rows) is a hole and counts as zeros.
template <class T>
struct Operand {
  Rows<T> x;
  const int* index;
  int n, rows, first;

  __device__ __forceinline__ const T* row(int r) const {
    const int place = first + r;
    if (place >= n) return nullptr;
    const int i = index ? index[place] : place;
    return i >= 0 && i < rows ? x[i] : nullptr;
  }
};

template <class T>
struct TileSmem {
  static constexpr int kSlab = PairTiles::row_bytes / int(sizeof(T));  // channels of a slab
  // Chunk c of row r lies at position c ^ (r % 8): eight rows then cover all banks, for ldmatrix and for the CUDA
  // cores.
  alignas(128) T slab[PairTiles::stages][2][PairTiles::tile][kSlab];

  __device__ T* chunk(int stage, int operand, int row, int c) {
    return &slab[stage][operand][row][(c ^ (row & 7)) * kVec<T>];
  }
};

// The products of one tile: which engine makes them, and who owns which.
template <class T>
struct PairTile {
  static constexpr int kChunks = PairTiles::row_bytes / 16;
  static constexpr int kBlock = 4;  // rows and columns of a thread
  static_assert(PairTiles::threads == 256 && PairTiles::tile == 64, "the maps below are for 256 threads on 64 x 64");

  float acc[kBlock][kBlock];  // CUDA cores: row, column; tensor cores: fragment, element
  bool tensor;                // tensor cores: 16-bit types, dot products
  bool l2;                    // squared differences instead

  __device__ explicit PairTile(bool squared_differences)
      : tensor(sizeof(T) == 2 && !squared_differences), l2(squared_differences) {}

  // Tile coordinates of the thread's r-th row and q-th column, and their product. On tensor cores a warp owns 32 x 16
  // as 2 x 2 fragments; on CUDA cores a thread owns every sixteenth row and column.
  __device__ int row(int r) const {
    const int tid = int(threadIdx.x), warp = tid / 32, lane = tid % 32;
    return tensor ? warp / 4 * 32 + r / 2 * 16 + r % 2 * 8 + lane / 4 : tid / 16 + 16 * r;
  }
  __device__ int column(int q) const {
    const int tid = int(threadIdx.x), warp = tid / 32, lane = tid % 32;
    return tensor ? warp % 4 * 16 + q / 2 * 8 + lane % 4 * 2 + q % 2 : tid % 16 + 16 * q;
  }
  __device__ float product(int r, int q) const {
    return tensor ? acc[r / 2 * 2 + q / 2][r % 2 * 2 + q % 2] : acc[r][q];
  }
  // Sixteen threads share a row of the tile; the thread's place among them.
  __device__ int sharer() const {
    const int tid = int(threadIdx.x);
    return tensor ? tid / 32 % 4 * 4 + tid % 4 : tid % 16;
  }

  // Every thread of the block calls this; it ends with a barrier, after which the slabs may be overwritten. An operand
  // may be of another type, with row(r) and x as in Operand.
  template <class Side = Operand<T>>
  __device__ __forceinline__ void compute(TileSmem<T>& s, const Side& rows, const Side& columns) {
#pragma unroll
    for (int i = 0; i < kBlock * kBlock; ++i) acc[i / kBlock][i % kBlock] = 0.0f;
    const int slabs = (rows.x.C + TileSmem<T>::kSlab - 1) / TileSmem<T>::kSlab;
#pragma unroll 1
    for (int i = 0; i < PairTiles::stages - 1; ++i) load(s, rows, columns, i, slabs);
#pragma unroll 1
    for (int i = 0; i < slabs; ++i) {
      gpu::cp_async_wait<PairTiles::stages - 2>();
      __syncthreads();  // slab i has arrived for everyone, and everyone is done with slab i - 1, whose stage is
                        // refilled
      load(s, rows, columns, i + PairTiles::stages - 1, slabs);
      const int stage = i % PairTiles::stages;
      if constexpr (sizeof(T) == 2) {
        if (tensor)
          multiply_tensor(s, stage);
        else
          multiply<true>(s, stage);
      } else {
        if (l2)
          multiply<true>(s, stage);
        else
          multiply<false>(s, stage);
      }
    }
    gpu::cp_async_wait<0>();
    __syncthreads();
  }

 private:
  // Both operands of slab i into its stage; holes, places past the last and channels past C become zeros. One group per
  // call, empty past the last slab, so that the number of groups in flight stays constant.
  template <class Side>
  __device__ __forceinline__ void load(TileSmem<T>& s, const Side& rows, const Side& columns, int i, int slabs) const {
    if (i < slabs) {
      if (rows.x.whole && columns.x.whole)
        load_pieces<true>(s, rows, columns, i);
      else
        load_pieces<false>(s, rows, columns, i);
    }
    gpu::cp_async_commit();
  }

  template <bool kWhole, class Side>
  __device__ __forceinline__ void load_pieces(TileSmem<T>& s, const Side& rows, const Side& columns, int i) const {
    constexpr int kPieces = 2 * PairTiles::tile * kChunks;
    const int C = rows.x.C, chunks = chunks_of(C, kVec<T>), stage = i % PairTiles::stages;
#pragma unroll(kWhole ? kPieces / PairTiles::threads : 1)
    for (int piece = int(threadIdx.x); piece < kPieces; piece += PairTiles::threads) {
      const int c = piece % kChunks, r = piece / kChunks % PairTiles::tile, operand = piece / kChunks / PairTiles::tile;
      const int chunk = i * kChunks + c;
      const T* row = operand ? columns.row(r) : rows.row(r);  // not (a ? b : c).row: that has an address
      const bool inside = row && chunk < chunks;
      T* target = s.chunk(stage, operand, r, c);
      if constexpr (kWhole) {
        gpu::cp_async16(target, inside ? row + chunk * kVec<T> : rows.x.base, inside);
      } else {
        *reinterpret_cast<uint4*>(target) = inside ? load_chunk<T, false>(row, chunk, C) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  __device__ __forceinline__ void multiply_tensor(TileSmem<T>& s, int stage) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const int rows = warp / 4 * 32, columns = warp % 4 * 16;
#pragma unroll
    for (int c = 0; c < kChunks; c += 2) {  // 16 channels
      uint32_t a[2][4], b[4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        gpu::ldmatrix_x4(a[m], s.chunk(stage, 0, rows + m * 16 + lane % 16, c + lane / 16));
      }
      gpu::ldmatrix_x4(b, s.chunk(stage, 1, columns + lane % 8 + lane / 16 * 8, c + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint32_t fragment[2] = {b[2 * n], b[2 * n + 1]};
          gpu::mma_m16n8k16<T>(acc[m * 2 + n], a[m], fragment);
        }
      }
    }
  }

  template <bool kL2>
  __device__ __forceinline__ void multiply(TileSmem<T>& s, int stage) {
    const int rows = int(threadIdx.x) / 16, columns = int(threadIdx.x) % 16;
#pragma unroll 1
    for (int c = 0; c < kChunks; ++c) {
      float a[kBlock][kVec<T>];
#pragma unroll
      for (int r = 0; r < kBlock; ++r) {
        unpack<T>(*reinterpret_cast<const uint4*>(s.chunk(stage, 0, rows + 16 * r, c)), a[r]);
      }
#pragma unroll
      for (int q = 0; q < kBlock; ++q) {
        float b[kVec<T>];
        unpack<T>(*reinterpret_cast<const uint4*>(s.chunk(stage, 1, columns + 16 * q, c)), b);
#pragma unroll
        for (int r = 0; r < kBlock; ++r) {
          acc[r][q] = accumulate<kVec<T>, kL2>(acc[r][q], a[r], b);
        }
      }
    }
  }
};

}  // namespace tokencomp
