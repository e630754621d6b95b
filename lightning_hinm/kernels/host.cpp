// The product of a HiNM weight with activations on a CPU. A tile gathers some of its kept vectors into the first cache,
// and each of its rows multiplies the n of m that it has there: no zero is read, and none is multiplied.
//
// Shapes: O rows in tiles of V, I columns, P kept vectors of a tile, K = P * n / m values of a row; N tokens of each
// image (a linear layer has one image), which are taken WIDE at a time: a block. Tokens are the lanes of a vector.
//
// Three steps for some blocks at a time, each shared out over the threads:
//   turn      x -> [I, lanes] of each block, unless the vectors are gathered from x as it lies
//   multiply  one tile of one block at a time -> [O, lanes], rows as they are packed
//   write     -> out, rows in the order of the channels, plus the bias
// A few tokens go another way: there the values of a row are the lanes.
//
// The caller has checked shapes and dtypes. Numbers of columns and rows are compared with their bounds here, and a
// position is a byte, for which there is always room: no number in a tensor leads out of bounds.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include <omp.h>

namespace {

// Lanes of a register, and how many registers hold sums: half of those that there are.
#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 16;
#elif defined(__AVX__)
constexpr int LANES = 8, SUMS = 8;
#else
constexpr int LANES = 4, SUMS = 8;
#endif
// A value that was read once multiplies so many vectors of tokens. With AVX-512, 64 held columns of them take half of
// the first cache, and the sums of a tile the other half. Eight were a little faster for hundreds of tokens, and slower
// for fewer.
constexpr int VECTORS = 4;
constexpr int WIDE = LANES * VECTORS;
constexpr int POSITIONS = 256;            // that a byte can name
constexpr int STRIP = 64;                 // columns or rows that a thread turns at a time
constexpr int BLOCKS = 4;                 // of a thread between two barriers, as far as they fit into
constexpr int64_t SCRATCH = 8 << 20;      // floats
constexpr int FEW = 8;                    // tokens; as soon as 16 lanes are worth it, tokens are the lanes

// As many rows at a time as hide the latency of a multiply-add and still have registers.
constexpr int rows_at_once(int vectors) { return vectors <= SUMS / 4 ? 4 : vectors <= SUMS / 2 ? 2 : 1; }

typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
typedef float loose_vec __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t loose_halves __attribute__((vector_size(2 * LANES), may_alias, aligned(2)));
typedef uint8_t loose_bytes __attribute__((vector_size(LANES), may_alias, aligned(1)));

struct bfloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline vec load(const float* x) { return *(const loose_vec*)x; }
inline vec load(const bfloat16* x) { return (vec)(__builtin_convertvector(*(const loose_halves*)x, words) << 16); }
// Of the first `count`; at least one.
template <class T> inline vec load(const T* x, int count) {
  if (count >= LANES) return load(x);
  T some[LANES] = {};
  memcpy(some, x, sizeof(T) * (count & (LANES - 1)));
  return load(some);
}
inline void store(float* x, vec v) { *(loose_vec*)x = v; }
inline void store(bfloat16* x, vec v) {  // to the nearest, ties to even
  // What is not a number stays so: made of bfloat16, its last 16 bits are zero, and nothing is carried.
  const words bits = (words)v;
  *(loose_halves*)x = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, halves);
}
template <class T> inline void store(T* x, vec v, int count) {
  if (count >= LANES) return store(x, v);
  T some[LANES];
  store(some, v);
  memcpy(x, some, sizeof(T) * (count & (LANES - 1)));
}

// In blocks of 2S x 2S, the S x S off the diagonal change places.
template <int S, int... I> inline void exchange(vec& upper, vec& lower, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  const vec left = __builtin_shufflevector(upper, lower, (I / S % 2 ? LANES + I - S : I)...);
  lower = __builtin_shufflevector(upper, lower, (I / S % 2 ? LANES + I : I + S)...);
#else
  const vec left = __builtin_shuffle(upper, lower, ints{(I / S % 2 ? LANES + I - S : I)...});
  lower = __builtin_shuffle(upper, lower, ints{(I / S % 2 ? LANES + I : I + S)...});
#endif
  upper = left;
}
template <int S = LANES / 2> inline void transpose(vec (&rows)[LANES]) {
  for (int i = 0; i < LANES; i++)
    if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, LANES>());
  if constexpr (S > 1) transpose<S / 2>(rows);
}

template <class T> struct Call {
  const T* x;
  const T* values;            // [O, K]
  const uint8_t* positions;   // [O, K], of each value among the `held` kept vectors that it belongs to
  const int64_t* columns;     // [tiles, P]
  const int64_t* restore;     // [O], the packed row of each channel; null where rows are in order
  const T* bias;              // [O], or null
  T* out;
  int64_t rows, vector_size, kept, taken;   // O, V, P, K
  int64_t group_taken;                      // n
  int64_t held, held_taken;                 // vectors that are gathered at a time, and the values of a row in them
  int64_t bound;                            // of columns: I, where x is turned
  int64_t images, tokens;                   // N of each image
  int64_t x_image, x_token, x_column;       // strides, in numbers; where x is turned, one of the last two is 1
  int64_t out_image, out_token, out_row;    // likewise; one of the last two is 1
  int64_t pitch, width;                     // of each `pitch` tokens, the first `width` are written
  int64_t turns;                            // 0: vectors are gathered from x, and x_token is 1
  int64_t threads;

  int64_t tiles() const { return (rows + vector_size - 1) / vector_size; }
  int64_t blocks() const { return (tokens + WIDE - 1) / WIDE; }  // of an image
};

struct Block {
  int64_t image, first;
  int count, vectors, lanes;  // tokens, the registers that they take, and the lanes of these
  template <class T> Block(const Call<T>& call, int64_t number) {
    image = number / call.blocks();
    first = number % call.blocks() * WIDE;
    count = int(std::min<int64_t>(WIDE, call.tokens - first));
    vectors = (count + LANES - 1) / LANES;
    lanes = vectors * LANES;
  }
};

// turned: [I, lanes]; of it, STRIP columns
template <class T> void turn(const Call<T>& call, const Block& block, int64_t strip, float* turned) {
  const T* x = call.x + block.image * call.x_image + block.first * call.x_token;
  const int64_t end = std::min(strip + STRIP, call.bound);
  if (call.x_token == 1) {
    for (int64_t column = strip; column < end; column++)
      for (int j = 0; j < block.lanes; j += LANES)
        store(turned + column * block.lanes + j, load(x + column * call.x_column + j, block.count - j));
    return;
  }
  for (int64_t column = strip; column < end; column += LANES) {
    const int some = int(std::min<int64_t>(LANES, end - column));
    for (int j = 0; j < block.lanes; j += LANES) {
      vec rows[LANES] = {};
      for (int i = 0; i < std::min(LANES, block.count - j); i++) rows[i] = load(x + (j + i) * call.x_token + column, some);
      transpose(rows);
      for (int i = 0; i < some; i++) store(turned + (column + i) * block.lanes + j, rows[i]);
    }
  }
}

// held: [POSITIONS, NV * LANES]; sums: [R, NV * LANES], which start at zero, or go on
template <int NV, int R, class T>
inline void multiply_rows(const Call<T>& call, int64_t place, int64_t taken, const float* held, float* sums, bool goes_on) {
  const T* values = call.values + place;
  const uint8_t* positions = call.positions + place;
  vec sum[R][NV];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < NV; j++) sum[r][j] = goes_on ? ((const vec*)sums)[r * NV + j] : vec{};
  for (int64_t k = 0; k < taken; k++)
    for (int r = 0; r < R; r++) {
      const vec* x = (const vec*)held + positions[r * call.taken + k] * NV;
      const float value = widen(values[r * call.taken + k]);
      for (int j = 0; j < NV; j++) sum[r][j] += value * x[j];
    }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < NV; j++) ((vec*)sums)[r * NV + j] = sum[r][j];
}

// sums: [V, NV * LANES]
template <int NV, class T>
void multiply_tile(const Call<T>& call, const Block& block, int64_t tile, const float* turned, float* sums) {
  constexpr int R = rows_at_once(NV), lanes = NV * LANES;
  alignas(64) float held[POSITIONS * lanes];
  const int64_t top = tile * call.vector_size, rows = std::min(call.vector_size, call.rows - top);
  const T* x = call.x + block.image * call.x_image + block.first;
  for (int64_t first = 0, before = 0; first < call.kept; first += call.held, before += call.held_taken) {
    const int64_t* columns = call.columns + tile * call.kept + first;
    const int64_t count = std::min(call.held, call.kept - first);
    for (int64_t k = 0; turned && k < count; k++)
      for (int j = 0; j < lanes; j += LANES) store(held + k * lanes + j, load(turned + columns[k] * lanes + j));
    for (int64_t k = 0; !turned && k < count; k++)
      for (int j = 0; j < lanes; j += LANES)
        store(held + k * lanes + j, load(x + columns[k] * call.x_column + j, block.count - j));
    const int64_t taken = std::min(call.held_taken, call.taken - before);
    int64_t row = 0;
    for (; row + R <= rows; row += R) {
      const int64_t place = (top + row) * call.taken + before;
      // Rows are far apart, in pages of their own, which nothing else fetches ahead of time.
      for (int64_t next = place + R * call.taken; next < place + 2 * R * call.taken; next += call.taken) {
        for (int64_t k = 0; k < taken; k += 64 / int64_t(sizeof(T))) __builtin_prefetch(call.values + next + k);
        __builtin_prefetch(call.positions + next);
      }
      multiply_rows<NV, R>(call, place, taken, held, sums + row * lanes, before > 0);
    }
    for (; row < rows; row++)
      multiply_rows<NV, 1>(call, (top + row) * call.taken + before, taken, held, sums + row * lanes, before > 0);
  }
}

template <class T>
void multiply(const Call<T>& call, const Block& block, int64_t tile, const float* turned, float* sums) {
  switch (block.vectors) {
    case 1: return multiply_tile<1>(call, block, tile, turned, sums);
    case 2: return multiply_tile<2>(call, block, tile, turned, sums);
    case 3: return multiply_tile<3>(call, block, tile, turned, sums);
    default: return multiply_tile<4>(call, block, tile, turned, sums);
  }
}

// sums: [O, lanes], rows as they are packed; of the channels, STRIP are written
template <class T> void write(const Call<T>& call, const Block& block, int64_t strip, const float* sums) {
  T* out = call.out + block.image * call.out_image;
  const int64_t end = std::min(strip + STRIP, call.rows);
  int64_t where[WIDE];  // the place of each token among those that are written, or -1
  for (int j = 0; j < block.count; j++) {
    const int64_t token = block.first + j, across = token % call.pitch;
    where[j] = across < call.width ? token / call.pitch * call.width + across : -1;
  }
  const auto sums_of = [&](int64_t row) { return sums + (call.restore ? call.restore[row] : row) * block.lanes; };
  const auto bias_of = [&](int64_t row) { return call.bias ? widen(call.bias[row]) : 0.0f; };
  if (call.out_token == 1) {
    for (int64_t row = strip; row < end; row++)
      for (int j = 0, stop; j < block.count; j = stop) {
        stop = j + 1;
        if (where[j] < 0) continue;
        while (stop < std::min(j + LANES, block.count) && where[stop] == where[j] + stop - j) stop++;
        store(out + row * call.out_row + where[j], load(sums_of(row) + j, stop - j) + bias_of(row), stop - j);
      }
    return;
  }
  for (int64_t row = strip; row < end; row += LANES) {
    const int some = int(std::min<int64_t>(LANES, end - row));
    for (int j = 0; j < block.lanes; j += LANES) {
      vec rows[LANES] = {};
      for (int i = 0; i < some; i++) rows[i] = load(sums_of(row + i) + j) + bias_of(row + i);
      transpose(rows);
      for (int i = 0; i < std::min(LANES, block.count - j); i++)
        if (where[j + i] >= 0) store(out + where[j + i] * call.out_token + row, rows[i], some);
    }
  }
}

// Kept by each thread that calls: a small layer would spend more time on fresh pages than on its product.
float* scratch(int64_t floats) {
  struct Memory {
    float* data = nullptr;
    int64_t floats = 0;
    ~Memory() { free(data); }
  };
  static thread_local Memory memory;
  if (floats > memory.floats) {
    free(memory.data);
    memory.data = (float*)aligned_alloc(64, size_t(floats + 15) / 16 * 64);
    memory.floats = memory.data ? floats : 0;
  }
  return memory.data;
}

template <class T> bool run_blocks(const Call<T>& call) {
  const int64_t blocks = call.blocks() * call.images, tiles = call.tiles();
  const int64_t turned_floats = call.turns ? call.bound * WIDE : 0, floats = turned_floats + call.rows * WIDE;
  const int64_t step = std::clamp<int64_t>(SCRATCH / floats, 1, std::min(blocks, BLOCKS * call.threads));
  const int64_t x_strips = call.turns ? (call.bound + STRIP - 1) / STRIP : 0, strips = (call.rows + STRIP - 1) / STRIP;
  float* const memory = scratch(step * floats);
  if (!memory) return false;
#pragma omp parallel num_threads(int(call.threads))
  for (int64_t start = 0; start < blocks; start += step) {
    const int64_t count = std::min(step, blocks - start);
    const auto turned_of = [&](int64_t block) { return memory + block * floats; };
    const auto sums_of = [&](int64_t block) { return memory + block * floats + turned_floats; };
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count * x_strips; i++)
      turn(call, Block(call, start + i / x_strips), i % x_strips * STRIP, turned_of(i / x_strips));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count * tiles; i++) {
      const Block block(call, start + i / tiles);
      float* const sums = sums_of(i / tiles) + i % tiles * call.vector_size * block.lanes;
      multiply(call, block, i % tiles, call.turns ? turned_of(i / tiles) : nullptr, sums);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count * strips; i++)
      write(call, Block(call, start + i / strips), i % strips * STRIP, sums_of(i / strips));
  }
  return true;
}

#if !defined(__clang__)  // which cannot pick lanes by a variable
// Where half of the kept vectors are taken, LANES values multiply vectors among 2 * LANES neighbours, and two registers
// hold those. held: [N, pitch]; sums: [O, N]
template <int N, int R, class T>
inline void multiply_few_rows(const Call<T>& call, int64_t row, const float* held, int64_t pitch, float* sums) {
  vec sum[R][N] = {};
  for (int64_t k = 0; k < call.taken; k += LANES) {
    const int some = int(std::min<int64_t>(LANES, call.taken - k));
    for (int r = 0; r < R; r++) {
      const int64_t place = (row + r) * call.taken + k;
      const vec value = load(call.values + place, some);
      loose_bytes position = loose_bytes{} + 255;  // where nothing is left: the last of the lanes, past all kept vectors
      if (some == LANES) position = *(const loose_bytes*)(call.positions + place);
      else memcpy(&position, call.positions + place, some);
      const ints from = __builtin_convertvector(position, ints);  // of which a shuffle takes the last bits
      for (int t = 0; t < N; t++) {
        const vec* x = (const vec*)(held + t * pitch + 2 * k);
        sum[r][t] += value * __builtin_shuffle(x[0], x[1], from);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < N; t++) {
      float total = 0;
      for (int i = 0; i < LANES; i++) total += sum[r][t][i];
      sums[(row + r) * N + t] = total;
    }
}

template <int N, class T>
void multiply_few(const Call<T>& call, int64_t tile, float* held, int64_t pitch, float* sums) {
  constexpr int R = rows_at_once(N);
  const int64_t* columns = call.columns + tile * call.kept;
  for (int t = 0; t < N; t++)
    for (int64_t k = 0; k < pitch; k++)
      held[t * pitch + k] = k < call.kept ? widen(call.x[t * call.x_token + columns[k] * call.x_column]) : 0.0f;
  int64_t row = tile * call.vector_size;
  const int64_t end = std::min(row + call.vector_size, call.rows);
  for (; row + R <= end; row += R) multiply_few_rows<N, R>(call, row, held, pitch, sums);
  for (; row < end; row++) multiply_few_rows<N, 1>(call, row, held, pitch, sums);
}

template <class T> bool run_few(const Call<T>& call) {
  const int64_t n = call.tokens, pitch = (call.kept + 2 * LANES - 1) / (2 * LANES) * 2 * LANES;
  const int64_t own = (n * pitch + STRIP + 15) / 16 * 16;
  float* const memory = scratch(call.threads * own + call.rows * n);
  if (!memory) return false;
  float* const sums = memory + call.threads * own;
#pragma omp parallel num_threads(int(call.threads))
  {
    float* const held = memory + omp_get_thread_num() * own;
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < call.tiles(); tile++) switch (n) {
        case 1: multiply_few<1>(call, tile, held, pitch, sums); break;
        case 2: multiply_few<2>(call, tile, held, pitch, sums); break;
        case 3: multiply_few<3>(call, tile, held, pitch, sums); break;
        case 4: multiply_few<4>(call, tile, held, pitch, sums); break;
        case 5: multiply_few<5>(call, tile, held, pitch, sums); break;
        case 6: multiply_few<6>(call, tile, held, pitch, sums); break;
        case 7: multiply_few<7>(call, tile, held, pitch, sums); break;
        default: multiply_few<8>(call, tile, held, pitch, sums);
      }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < call.rows; row++) {
      const float* from = sums + (call.restore ? call.restore[row] : row) * n;
      const float bias = call.bias ? widen(call.bias[row]) : 0.0f;
      for (int t = 0; t < n; t++) store(call.out + t * call.out_token + row * call.out_row, vec{} + (from[t] + bias), 1);
    }
  }
  return true;
}
#endif

// 0, or what is wrong: 1 a column, 2 a row, 3 no memory
template <class T> int run(const Call<T>& call) {
  bool outside = false;  // without a branch, so that registers of numbers are compared at once
  for (int64_t i = 0; i < call.tiles() * call.kept; i++) outside |= uint64_t(call.columns[i]) >= uint64_t(call.bound);
  if (outside) return 1;
  for (int64_t i = 0; call.restore && i < call.rows; i++) outside |= uint64_t(call.restore[i]) >= uint64_t(call.rows);
  if (outside) return 2;
#if !defined(__clang__)
  // Then LANES values are those of whole groups, and `held`, 64, is a multiple of what two registers hold.
  const bool halved = 2 * call.taken == call.kept && LANES % call.group_taken == 0 && call.held % (2 * LANES) == 0;
  const bool whole = call.images == 1 && (call.pitch == call.width || call.tokens <= call.width);
  if (halved && whole && call.tokens <= FEW) return run_few(call) ? 0 : 3;
#endif
  return run_blocks(call) ? 0 : 3;
}

}  // namespace

extern "C" int hinm_float32(const void* call) { return run(*(const Call<float>*)call); }
extern "C" int hinm_bfloat16(const void* call) { return run(*(const Call<bfloat16>*)call); }
