// k-center on CUDA: products of all pairs of rows, 64 x 64 at a time. Slabs of both operands travel through a ring of
// cp.async stages in shared memory; 16-bit dot products run on tensor cores (ldmatrix + mma.m16n8k16), fp32 and squared
// differences on CUDA cores in 4 x 4 register blocks. Both engines leave a thread with 4 rows x 4 columns, and both add
// the channels in order, so a product does not depend on the tile it falls in. O(64^2 C) per tile.
#pragma once

#include "cuda/kcenter_rows.h"

namespace tokencomp::kcenter {

template <class T>
struct TileSmem {
  static constexpr int kSlab = CudaTiles::row_bytes / int(sizeof(T));  // channels of a slab
  // Chunk c of row r lies at position c ^ (r % 8): eight rows then cover all banks, for ldmatrix and for the CUDA
  // cores.
  alignas(128) T slab[CudaTiles::stages][2][CudaTiles::tile][kSlab];

  __device__ T* chunk(int stage, int operand, int row, int c) {
    return &slab[stage][operand][row][(c ^ (row & 7)) * kVec<T>];
  }
};

// The pairs of one item: which engine, and who owns which product.
template <class T>
struct PairTile {
  static constexpr int kChunks = CudaTiles::row_bytes / 16;
  static constexpr int kBlock = 4;  // rows and columns of a thread
  static_assert(CudaTiles::threads == 256 && CudaTiles::tile == 64, "the maps below are for 256 threads on 64 x 64");

  float acc[kBlock][kBlock];  // CUDA cores: row, column; tensor cores: fragment, element
  int row0, column0;          // where the tile starts
  bool tensor;                // tensor cores: 16-bit types, dot products
  bool l2;

  __device__ PairTile(Metric metric) : tensor(sizeof(T) == 2 && metric != Metric::l2), l2(metric == Metric::l2) {}

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

  // Every thread of the block calls this; it ends with a barrier, after which the slabs may be overwritten.
  __device__ __forceinline__ void compute(TileSmem<T>& s, const Rows<T>& x, int n, int first_row, int first_column) {
    row0 = first_row;
    column0 = first_column;
#pragma unroll
    for (int i = 0; i < kBlock * kBlock; ++i) acc[i / kBlock][i % kBlock] = 0.0f;
    const int slabs = (x.C + TileSmem<T>::kSlab - 1) / TileSmem<T>::kSlab;
#pragma unroll 1
    for (int i = 0; i < CudaTiles::stages - 1; ++i) load(s, x, n, i, slabs);
#pragma unroll 1
    for (int i = 0; i < slabs; ++i) {
      gpu::cp_async_wait<CudaTiles::stages - 2>();
      __syncthreads();  // slab i has arrived for everyone, and everyone is done with slab i - 1, whose stage is
                        // refilled
      load(s, x, n, i + CudaTiles::stages - 1, slabs);
      const int stage = i % CudaTiles::stages;
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
  // Both operands of slab i into its stage; rows past n and channels past C become zeros. One group per call, empty
  // past the last slab, so that the number of groups in flight stays constant.
  __device__ __forceinline__ void load(TileSmem<T>& s, const Rows<T>& x, int n, int i, int slabs) const {
    if (i < slabs) {
      if (x.whole)
        load_pieces<true>(s, x, n, i);
      else
        load_pieces<false>(s, x, n, i);
    }
    gpu::cp_async_commit();
  }

  template <bool kWhole>
  __device__ __forceinline__ void load_pieces(TileSmem<T>& s, const Rows<T>& x, int n, int i) const {
    constexpr int kPieces = 2 * CudaTiles::tile * kChunks;
    const int chunks = chunks_of(x.C, kVec<T>), stage = i % CudaTiles::stages;
#pragma unroll(kWhole ? kPieces / CudaTiles::threads : 1)
    for (int piece = int(threadIdx.x); piece < kPieces; piece += CudaTiles::threads) {
      const int c = piece % kChunks, r = piece / kChunks % CudaTiles::tile, operand = piece / kChunks / CudaTiles::tile;
      const int token = (operand ? column0 : row0) + r, chunk = i * kChunks + c;
      const bool inside = token < n && chunk < chunks;
      T* target = s.chunk(stage, operand, r, c);
      if constexpr (kWhole) {
        gpu::cp_async16(target, inside ? x[token] + chunk * kVec<T> : x.base, inside);
      } else {
        *reinterpret_cast<uint4*>(target) =
            inside ? load_chunk<T, false>(x[token], chunk, x.C) : make_uint4(0, 0, 0, 0);
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

}  // namespace tokencomp::kcenter
