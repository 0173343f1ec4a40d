// The library's door: a plain C ABI, the choice of instruction set, and threads over rows.
//
// No pool of ours waits beside torch's: the rows of a call are shared by torch's own OpenMP threads, which spin for a
// while after torch's last call and would take the cores from any others; where there are none, or after a fork, which
// they do not survive, by threads that are started for the call. Each row is written by one thread, so results do not
// depend on how many there are.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#if defined(AQ_WITH_X86)
#include <cpuid.h>
#endif

#if defined(__aarch64__)
namespace neon {
extern const KernelTable table;
}
namespace baseline = neon;
#else
namespace portable {
extern const KernelTable table;
}
namespace baseline = portable;
#endif
#if defined(AQ_WITH_X86)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512vnni {
extern const KernelTable table;
}
#if defined(AQ_WITH_AMX)
namespace amx {
extern const KernelTable table;
}
#endif
#endif

namespace {

constexpr int64_t CHUNK_VALUES = 1 << 16;      // below this a thread costs more than it saves
constexpr int64_t MOST_CHUNK_VALUES = 1 << 18;  // the first row of a chunk is read from memory that nobody asked for before
constexpr int64_t FAST_VALUES = 8;              // of a product, that take as long as one of other kernels
constexpr int64_t CHUNKS_OF_A_THREAD = 8;       // so that none waits long for the others

#if defined(AQ_WITH_X86)
// Clang's __builtin_cpu_supports knows no "f16c" (seen with 14).
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

#if defined(AQ_WITH_AMX)
// GCC and Clang call these bits differently.
constexpr unsigned VBMI = 1u << 1, AVX512_BF16 = 1u << 5, AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25;

bool has_bfloat16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(c & VBMI)) return false;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & AVX512_BF16);
}

// The registers are large, so Linux saves them only for processes that ask.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long ASK_FOR = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d;
  constexpr unsigned NEEDED = AMX_TILE | AMX_BF16 | AMX_INT8;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & NEEDED) != NEEDED) return false;
  return syscall(SYS_arch_prctl, ASK_FOR, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif
#endif

bool runs_here(const KernelTable& candidate) {
#if defined(AQ_WITH_AMX)
  if (&candidate == &amx::table) return runs_here(avx512vnni::table) && has_bfloat16() && may_use_tiles();
#endif
#if defined(AQ_WITH_X86)
  if (&candidate == &avx512vnni::table) return runs_here(avx512::table) && __builtin_cpu_supports("avx512vnni");
  if (&candidate == &avx512::table)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") &&
           has_f16c();
  if (&candidate == &avx2::table)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#endif
  (void)candidate;
  return true;
}

const KernelTable* const CANDIDATES[] = {
#if defined(AQ_WITH_AMX)
    &amx::table,
#endif
#if defined(AQ_WITH_X86)
    &avx512vnni::table, &avx512::table, &avx2::table,
#endif
    &baseline::table};

const KernelTable* best() {
  for (const KernelTable* candidate : CANDIDATES)
    if (runs_here(*candidate)) return candidate;
  return &baseline::table;
}

std::atomic<const KernelTable*> chosen{best()};

// GOMP_parallel of libgomp: run a function with this data in so many threads, of which the caller is one.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Team> team{nullptr};

template <class Share>
void in_threads(Share& share, int count) {
  const Team running = team.load();
  if (count > 1 && running) {
    running([](void* what) { (*static_cast<Share*>(what))(); }, &share, (unsigned)count, 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < count; i++) others.emplace_back(std::ref(share));
  } catch (const std::system_error&) {  // no more threads to be had: those that started do the work
  }
  share();
  for (std::thread& other : others) other.join();
}

// How many rows of so many values a thread takes at a time.
int64_t step_of(int64_t rows, int64_t columns, int threads) {
  const int64_t width = columns ? columns : 1, even_share = rows / (threads * CHUNKS_OF_A_THREAD);
  return std::max<int64_t>(1, std::max(CHUNK_VALUES / width, std::min(even_share, MOST_CHUNK_VALUES / width)));
}

template <class Ask, class Kernel>
void over_rows(const Ask& ask, Kernel kernel, int64_t rows, int64_t columns, int threads) {
  const int64_t step = step_of(rows, columns, threads);
  std::atomic<int64_t> next{0};
  auto share = [&] {
    for (int64_t first = next.fetch_add(step); first < rows; first = next.fetch_add(step))
      kernel(ask, first, first + step < rows ? first + step : rows);
  };
  const int64_t useful = std::min<int64_t>(threads, (rows + step - 1) / step);
  in_threads(share, (int)useful);
}

// For some cycles less than nothing, so that a thread beside this one on the same core gets more of it.
void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int PAUSES = 1 << 12;  // some 50 us
constexpr std::chrono::microseconds NAP{20};

// Never by giving the core up to whoever wants it: that is for as long as another process likes, some milliseconds. One
// that naps is the next one to run, and leaves its core to the thread that is waited for until then.
void wait_for(const std::atomic<int64_t>& done, int64_t all) {
  for (int pauses = 0; done < all; pauses++) {
    if (pauses < PAUSES)
      pause();
    else
      std::this_thread::sleep_for(NAP);
  }
}

// Two kinds of rows by the same threads, the second once all of the first are done: starting threads twice costs more
// than waiting here.
template <class Ask, class One, class Other>
void over_both(const Ask& ask, One one, int64_t ones, Other other, int64_t others, int64_t step, int threads) {
  std::atomic<int64_t> next{0}, done{0}, next_other{0};
  auto share = [&] {
    for (int64_t i = next++; i < ones; i = next++, done++) one(ask, i, i + 1);
    wait_for(done, ones);
    for (int64_t i = next_other.fetch_add(step); i < others; i = next_other.fetch_add(step))
      other(ask, i, std::min(i + step, others));
  };
  in_threads(share, (int)std::min<int64_t>(threads, std::max(ones, (others + step - 1) / step)));
}

// A fresh result costs a page fault every 4 KiB, which can take longer than filling it; large pages make that one every
// 2 MiB. Only a hint, and only for what lies wholly in the result.
void expect_to_fill(void* result, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 1 << 21;
  const uintptr_t first = ((uintptr_t)result + PAGE - 1) / PAGE * PAGE, last = ((uintptr_t)result + bytes) / PAGE * PAGE;
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
  (void)result, (void)bytes;
#endif
}

// Memory that begins on a line of the cache, with no values in it yet.
struct Uninitialized {
  std::unique_ptr<uint16_t[]> all;
  explicit Uninitialized(int64_t size) : all(new uint16_t[size + 32]) { expect_to_fill(data(), 2 * size); }
  uint16_t* data() { return (uint16_t*)(((uintptr_t)all.get() + 63) / 64 * 64); }
};

int64_t groups_of(int64_t columns, int64_t group) { return (columns + group - 1) / group; }
int64_t row_bytes_of(int64_t columns, int bits) { return (columns * bits + 7) / 8; }

// A weight that is read where it lies; what it shall be written to is not said.
Dequantize packed(const uint8_t* codes, const uint8_t* scales, const uint8_t* zero_points, const uint16_t* row_scales,
                  int64_t columns, int bits, int64_t group) {
  return {codes,   scales, zero_points, row_scales,  nullptr, FLOAT32,
          columns, group,  groups_of(columns, group), row_bytes_of(columns, bits), bits};
}

}  // namespace

AQ_EXPORT int aq_abi() { return 13; }

// Share rows among the threads of this GOMP_parallel from now on, in this process; null: among threads of our own.
AQ_EXPORT void aq_use_team(Team gomp_parallel) {
#if defined(__unix__) || defined(__APPLE__)
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { team = nullptr; }); });
#endif
  team = gomp_parallel;
}

AQ_EXPORT const char* aq_isa() { return chosen.load()->name; }

// 0 when the named instruction set is now in use, 1 when this library or this processor has none of that name.
AQ_EXPORT int aq_use_isa(const char* name) {
  for (const KernelTable* candidate : CANDIDATES)
    if (!std::strcmp(candidate->name, name) && runs_here(*candidate)) {
      chosen = candidate;
      return 0;
    }
  return 1;
}

AQ_EXPORT void aq_quantize(const void* weight, int dtype, int64_t rows, int64_t columns, int bits, int64_t group,
                           const float* stretches, int stretch_count, const float* importance, uint8_t* codes,
                           uint8_t* scales, uint8_t* zero_points, uint16_t* row_scales, double* sums, int threads) {
  const int64_t groups = groups_of(columns, group), row_bytes = row_bytes_of(columns, bits);
  const Quantize ask{weight,    (Dtype)dtype,  columns,    group, groups, row_bytes,   bits,       !zero_points,
                     stretches, stretch_count, importance, codes, scales, zero_points, row_scales, sums};
  expect_to_fill(codes, rows * row_bytes);
  over_rows(ask, chosen.load()->quantize, rows, columns, threads);
}

AQ_EXPORT void aq_fit_grid(const void* weight, int dtype, int64_t rows, int64_t columns, int bits, int64_t group,
                           int symmetric, const float* stretches, int stretch_count, const float* importance,
                           float* step, float* full, float* mean_q, float* mean_w, int threads) {
  Quantize ask{};
  ask.weight = weight;
  ask.dtype = (Dtype)dtype;
  ask.columns = columns;
  ask.group = group;
  ask.groups = groups_of(columns, group);
  ask.bits = bits;
  ask.symmetric = symmetric != 0;
  ask.stretches = stretches;
  ask.stretch_count = stretch_count;
  ask.importance = importance;
  over_rows(FitGrid{ask, step, full, mean_q, mean_w}, chosen.load()->fit_grid, rows, columns, threads);
}

AQ_EXPORT void aq_quantize_columns(const float* block, const float* upper, const float* scale, const float* inverse,
                                   const float* zero, int64_t rows, int64_t columns, int bits, uint8_t* codes,
                                   float* errors, int threads) {
  const Columns ask{block, upper, scale, inverse, zero, codes, errors, columns, bits};
  over_rows(ask, chosen.load()->quantize_columns, rows, 8 * columns, threads);  // each value costs a loop
}

AQ_EXPORT void aq_dequantize(const uint8_t* codes, const uint8_t* scales, const uint8_t* zero_points,
                             const uint16_t* row_scales, void* weight, int dtype, int64_t rows, int64_t columns,
                             int bits, int64_t group, int threads) {
  const Dequantize ask{codes,   scales, zero_points,                row_scales,                  weight, (Dtype)dtype,
                       columns, group,  groups_of(columns, group), row_bytes_of(columns, bits), bits};
  expect_to_fill(weight, rows * columns * (dtype == FLOAT32 ? 4 : 2));
  over_rows(ask, chosen.load()->dequantize, rows, columns, threads);
}

AQ_EXPORT void aq_dequantize_r2q(const uint8_t* codes, const uint8_t* scales, const uint8_t* zero_points,
                                 const uint16_t* row_scales, void* weight, int dtype, int64_t rows, int64_t columns,
                                 int bits, int64_t group, int threads) {
  const Dequantize ask{codes,   scales, zero_points,                row_scales,                  weight, (Dtype)dtype,
                       columns, group,  groups_of(columns, group), row_bytes_of(columns, bits), bits};
  expect_to_fill(weight, rows * columns * (dtype == FLOAT32 ? 4 : 2));
  over_rows(ask, chosen.load()->dequantize_r2q, rows, columns, threads);
}

AQ_EXPORT void aq_quantize_columns_r2q(const float* block, const float* upper, const float* mu, const float* a1,
                                       const float* a2, const float* inverse, int64_t rows, int64_t columns, int bits,
                                       uint8_t* codes, float* errors, int threads) {
  const ResidualColumns ask{block, upper, mu, a1, a2, inverse, codes, errors, columns, bits};
  over_rows(ask, chosen.load()->quantize_columns_r2q, rows, 8 * columns, threads);  // each value costs a loop
}

AQ_EXPORT void aq_descend_columns(const uint8_t* codes, const float* pull, const float* gram, const float* mu,
                                  const float* a1, const float* a2, const float* inverse, int64_t rows,
                                  int64_t columns, int bits, uint8_t* found, int threads) {
  const Descent ask{codes, pull, gram, mu, a1, a2, inverse, found, columns, bits};
  over_rows(ask, chosen.load()->descend_columns, rows, 8 * columns, threads);  // each value costs a loop
}

AQ_EXPORT void aq_fit_residual(const float* weights, const float* importance, const float* mu, const float* a1,
                               const float* a2, int64_t n, int64_t groups, int starts, int bits, int symmetric,
                               int rounds, float* found_mu, float* found_a1, float* found_a2, int threads) {
  const ResidualFit ask{weights,  importance, mu, a1,     a2,   found_mu, found_a1,
                        found_a2, n,          groups, starts, bits, rounds,   symmetric != 0};
  const int64_t tiles = (groups + GROUPS_TOGETHER - 1) / GROUPS_TOGETHER;
  over_rows(ask, chosen.load()->fit_residual, tiles, GROUPS_TOGETHER * n * (starts + rounds), threads);
}

AQ_EXPORT void aq_hadamard(const float* from, float* to, int64_t rows, int64_t block, int threads) {
  expect_to_fill(to, rows * block * 4);
  over_rows(Hadamard{from, to, block}, chosen.load()->hadamard, rows, block, threads);
}

namespace {

// Some rows of x at a time: `prepare` is asked for their inputs, and `kernel` for rows of W.
template <class Ask, class Prepare, class Kernel>
void some_at_a_time(Ask ask, int64_t most, Prepare prepare, Kernel kernel, int threads) {
  const int64_t all = ask.count, item = ask.dtype == FLOAT32 ? 4 : 2;
  const char* x = (const char*)ask.x;
  char* y = (char*)ask.y;
  for (int64_t m = 0; m < all; m += most) {
    ask.count = std::min(most, all - m);
    ask.x = x + m * ask.of.columns * item;
    ask.y = y + m * ask.rows * item;
    prepare(ask);
    over_rows(ask, kernel, ask.rows, std::max<int64_t>(1, ask.of.columns / FAST_VALUES), threads);
  }
}

void multiply_floats(Product ask, int threads) {
  const KernelTable* table = chosen.load();
  std::vector<float> planes(std::min(ask.count, MOST_DIRECT) * ask.of.groups * ask.group_places());
  std::vector<float> sums(MOST_DIRECT * ask.of.groups);
  ask.planes = planes.data();
  ask.sums = sums.data();
  const auto prepare = [table](const Product& some) { table->split(some, 0, some.count); };
  some_at_a_time(ask, MOST_DIRECT, prepare, table->product, threads);
}

// The same in whole numbers of 8 bits: rounded inputs, or pieces whose sum they are.
void multiply_whole_numbers(RoundedProduct ask, int threads) {
  const KernelTable* table = chosen.load();
  const int64_t most = MOST_DIRECT - (ask.inputs() - ask.count);
  std::vector<int8_t> places(MOST_DIRECT * ask.pieces * ask.stream_places());
  std::vector<float> steps(MOST_DIRECT * ask.of.groups), sums(steps.size());
  ask.places = places.data();
  ask.steps = steps.data();
  ask.sums = sums.data();
  const auto prepare = [table](const RoundedProduct& some) { table->round_inputs(some, 0, some.inputs()); };
  some_at_a_time(ask, most, prepare, table->rounded_product, threads);
}

}  // namespace

AQ_EXPORT void aq_linear(const uint8_t* codes, const uint8_t* scales, const uint8_t* zero_points,
                         const uint16_t* row_scales, int64_t rows, int64_t columns, int bits, int64_t group,
                         int residual, const void* x, int dtype, int64_t count, const float* bias, void* y,
                         int threads) {
  const Dequantize of = packed(codes, scales, zero_points, row_scales, columns, bits, group);
  const Product ask{of, residual != 0, rows, x, (Dtype)dtype, count, nullptr, nullptr, bias, y};
  const int pieces = chosen.load()->pieces(ask);
  if (!pieces) return multiply_floats(ask, threads);
  multiply_whole_numbers({ask, false, 0.0f, 0.0f, nullptr, nullptr, pieces, of.group}, threads);
}

// Inputs are rounded by runs of so many columns; step is 0 where each has its own.
AQ_EXPORT void aq_linear_rounded(const uint8_t* codes, const uint8_t* scales, const uint8_t* zero_points,
                                 const uint16_t* row_scales, int64_t rows, int64_t columns, int bits, int64_t group,
                                 int residual, const void* x, int dtype, int64_t count, const float* bias, void* y,
                                 int64_t run, float step, int zero, int threads) {
  const Dequantize of = packed(codes, scales, zero_points, row_scales, columns, bits, group);
  const Product ask{of, residual != 0, rows, x, (Dtype)dtype, count, nullptr, nullptr, bias, y};
  multiply_whole_numbers({ask, step > 0.0f, step, (float)zero, nullptr, nullptr, 1, run}, threads);
}

namespace {

constexpr int64_t FEW_COLUMNS = 4096;  // whose floats, of two times as many rows, stay in the second-level cache

// How many tiles a thread takes at a time, of rows that are decoded and meet all panels; a kernel begins with memory of its own.
int64_t tiles_at_once(const TiledProduct& ask, int threads) {
  return step_of(ask.tiles(), (1 + ask.panels()) * ask.of.columns * ask.tile_rows / 2, threads);
}

void multiply_tiles_of_floats(TiledProduct ask, int threads) {
  const KernelTable* table = chosen.load();
  std::vector<float> inputs(ask.panels() * ask.of.columns * ask.lanes);
  ask.inputs_of_panels = inputs.data();
  if (ask.of.columns <= FEW_COLUMNS) ask.tile_rows *= 2;
  over_both(ask, table->fill_panels, ask.panels(), table->tiled_product, ask.tiles(), tiles_at_once(ask, threads), threads);
}

void multiply_tiles_of_bytes(TiledProduct ask, int threads) {
  const KernelTable* table = chosen.load();
  std::vector<int32_t> inputs(ask.panels() * ask.words() * ask.lanes);
  std::vector<float> steps(ask.panels() * ask.of.groups * ask.lanes), sums(steps.size());
  ask.inputs_of_panels = inputs.data();
  ask.steps = steps.data();
  ask.sums = sums.data();
  over_both(ask, table->fill_rounded_panels, ask.panels(), table->rounded_tiled_product, ask.tiles(),
            tiles_at_once(ask, threads), threads);
}

// Lanes of a panel for so many rows of x, or their pieces.
int64_t lanes_for(int64_t count) {
  const int64_t lanes = chosen.load()->lanes;
  return count > lanes ? 2 * lanes : lanes;
}

bool tiles_bytes(const Product& ask, int pieces) {
  const bool whole_words = ask.of.group % TiledProduct::WORD_COLUMNS == 0 || ask.of.groups == 1;
  return whole_words && chosen.load()->tiles_bytes(ask, pieces);
}

// As how many pieces x as it is meets tiles of bytes; 0 where floats are faster.
int pieces_of_tiles(const Product& ask) {
  const int pieces = chosen.load()->pieces(ask);
  return pieces && tiles_bytes(ask, pieces) ? pieces : 0;
}

}  // namespace

// 1 where so many rows of x meet tiles of bytes in aq_linear_tiled.
AQ_EXPORT int aq_tiles_bytes(int64_t columns, int bits, int64_t group, int residual, int dtype, int64_t count) {
  const Dequantize of = packed(nullptr, nullptr, nullptr, nullptr, columns, bits, group);
  return pieces_of_tiles({of, residual != 0, 0, nullptr, (Dtype)dtype, count, nullptr, nullptr, nullptr, nullptr}) != 0;
}

// For many rows of x.
AQ_EXPORT void aq_linear_tiled(const uint8_t* codes, const uint8_t* scales, const uint8_t* zero_points,
                               const uint16_t* row_scales, int64_t rows, int64_t columns, int bits, int64_t group,
                               int residual, const void* x, int dtype, int64_t count, const float* bias, void* y,
                               int threads) {
  const Dequantize of = packed(codes, scales, zero_points, row_scales, columns, bits, group);
  const Product ask{of, residual != 0, rows, x, (Dtype)dtype, count, nullptr, nullptr, bias, y};
  const int pieces = pieces_of_tiles(ask);
  const RoundedProduct as_it_is{ask, false, 0.0f, 0.0f, nullptr, nullptr, std::max(pieces, 1), of.group};
  (pieces ? multiply_tiles_of_bytes : multiply_tiles_of_floats)(
      {as_it_is, false, lanes_for(count * as_it_is.pieces), nullptr}, threads);
}

// For many rows of x, rounded as aq_linear_rounded does.
AQ_EXPORT void aq_linear_rounded_tiled(const uint8_t* codes, const uint8_t* scales, const uint8_t* zero_points,
                                       const uint16_t* row_scales, int64_t rows, int64_t columns, int bits,
                                       int64_t group, int residual, const void* x, int dtype, int64_t count,
                                       const float* bias, void* y, int64_t run, float step, int zero, int threads) {
  const Dequantize of = packed(codes, scales, zero_points, row_scales, columns, bits, group);
  const Product ask{of, residual != 0, rows, x, (Dtype)dtype, count, nullptr, nullptr, bias, y};
  const RoundedProduct rounded{ask, step > 0.0f, step, (float)zero, nullptr, nullptr, 1, run};
  (tiles_bytes(ask, 1) ? multiply_tiles_of_bytes : multiply_tiles_of_floats)({rounded, true, lanes_for(count), nullptr}, threads);
}

namespace {

// The sums of many inputs are worth more rows of W at a time, and so few chunks that two tiles of W and two panels stay in
// the first-level cache. Every thread gets some blocks.
void shape_blocks(BlockProduct& ask, int threads) {
  if (ask.count <= 4 * BlockProduct::PANEL) return;
  ask.chunks_at_once /= 2;
  while (ask.rows_of_block < 4 * BlockProduct::FEWEST_ROWS && ask.blocks_of_rows() >= 8 * threads) ask.rows_of_block *= 2;
}

// Columns of W that are rounded by one step; 0 where W stays as it is: for float32, for few rows of x, and where a step of
// columns is neither whole groups nor a part of one.
int64_t part_of(const BlockProduct& ask) {
  constexpr int64_t STEP = WholeBlockProduct::STEP, LONGEST = WholeBlockProduct::LONGEST_PART, SHORTEST_GROUP = 16;
  if (!ask.rounded || ask.dtype == FLOAT32 || ask.count < WholeBlockProduct::FEWEST || (ask.residual && ask.of.bits == 8)) return 0;
  if (ask.of.groups == 1) return std::min(LONGEST, (ask.of.columns + STEP - 1) / STEP * STEP);
  const bool fits = ask.of.group % STEP == 0 || (STEP % ask.of.group == 0 && ask.of.group >= SHORTEST_GROUP);
  if (!fits || ask.run % STEP) return 0;
  return ask.run <= LONGEST ? ask.run : ask.run % LONGEST == 0 ? LONGEST : STEP;
}

void multiply_blocks(BlockProduct ask, int64_t rows_at_once, int threads) {
  const KernelTable* table = chosen.load();
  Uninitialized inputs(ask.pieces() * ask.piece_size());
  ask.inputs = inputs.data();
  over_both(ask, table->fill_blocks, ask.panels(), table->block_product, ask.blocks_of_rows(), rows_at_once, threads);
}

void multiply_whole_blocks(const BlockProduct& block, int64_t part, int64_t rows_at_once, int threads) {
  const KernelTable* table = chosen.load();
  WholeBlockProduct ask{block, part};
  Uninitialized inputs(ask.panels() * ask.panel_bytes() / 2), steps(2 * ask.panels() * ask.parts() * ask.PANEL);
  ask.places = (int8_t*)inputs.data();
  ask.steps = (float*)steps.data();
  over_both(ask, table->fill_rounded_blocks, ask.panels(), table->rounded_block_product, ask.blocks_of_rows(), rows_at_once,
            threads);
}

}  // namespace

// 1 where this instruction set multiplies blocks of rows.
AQ_EXPORT int aq_multiplies_blocks() { return chosen.load()->block_product != nullptr; }

// For many rows of x, as they are where run is 0, else rounded to 8 bits.
AQ_EXPORT void aq_linear_blocks(const uint8_t* codes, const uint8_t* scales, const uint8_t* zero_points,
                                const uint16_t* row_scales, int64_t rows, int64_t columns, int bits, int64_t group,
                                int residual, const void* x, int dtype, int64_t count, const float* bias, void* y,
                                int64_t run, float step, int zero, int threads) {
  const Dequantize of = packed(codes, scales, zero_points, row_scales, columns, bits, group);
  BlockProduct ask{{{of, residual != 0, rows, x, (Dtype)dtype, count, nullptr, nullptr, bias, y},
                    step > 0.0f, step, (float)zero, nullptr, nullptr, 1, run ? run : of.group},
                   run != 0, nullptr, BlockProduct::FEWEST_ROWS};
  shape_blocks(ask, threads);
  const int64_t work = (2 + ask.panels()) * columns * ask.rows_of_block / (2 * FAST_VALUES);  // to decode, and to meet
  const int64_t at_once = step_of(ask.blocks_of_rows(), work, threads), part = part_of(ask);
  if (part) return multiply_whole_blocks(ask, part, at_once, threads);
  multiply_blocks(ask, at_once, threads);
}

namespace {

constexpr int64_t DECODED_AT_ONCE = 1 << 20;  // values of W, that a cache keeps while positions are gone through
constexpr int64_t MOST_GROUPS_OF_A_CHUNK = 16, CHANNELS_OF_A_CHUNK = 8;
constexpr int64_t GROUPS_OF_A_THREAD = 8;  // below, rows of W are shared out, too

}  // namespace

Convolution::Convolution(const Product& product, const ConvolutionSizes& sizes, const float* equalization,
                         int64_t positions, bool in_floats)
    : BlockProduct{}, ConvolutionSizes(sizes), in_floats(in_floats), positions(positions), equalization(equalization) {
  static_cast<Product&>(*this) = product;
  rows_of_block = in_floats ? FEWEST_ROWS_OF_FLOATS : FEWEST_ROWS;
  halves = in_floats ? 2 : pieces();
  phases = out_size = grid_size = 1;
  int64_t farthest = 0, last = 0;
  bool as_it_lies = dtype == (in_floats ? FLOAT32 : BFLOAT16) && !equalization && batch == 1;
  for (int axis = AXES - 1; axis >= 0; axis--) {
    const int64_t padded = in[axis] + 2 * padding[axis], reach = dilation[axis] * (kernel[axis] - 1);
    out[axis] = (padded - reach - 1) / stride[axis] + 1;
    grid[axis] = (padded + stride[axis] - 1) / stride[axis];
    ahead[axis] = grid_size;
    farthest += reach / stride[axis] * ahead[axis];
    last += (out[axis] - 1) * ahead[axis];
    phases *= stride[axis];
    out_size *= out[axis];
    grid_size *= grid[axis];
    as_it_lies = as_it_lies && stride[axis] == 1 && padding[axis] == 0;
  }
  count = (batch - 1) * grid_size + last + 1;  // up to the last position that is written
  const int64_t seen = groups_of_positions() * positions + farthest, whole = batch * grid_size;
  in_place = as_it_lies && (in_floats ? count >= positions : seen <= whole && of.columns % 32 == 0);
  const int64_t lines = (std::max(seen, whole) + 31) / 32;
  plane_size = in_place ? grid_size : (lines | 1) * 32;  // an odd number of lines: planes do not meet in the cache
}

namespace {

// Blocks of rows that fit, at least one.
int64_t blocks_kept(const Convolution& ask) {
  const int64_t of_block = ask.halves * ask.rows_of_block * ask.chunks() * 32;
  return std::clamp<int64_t>(DECODED_AT_ONCE / of_block, 1, ask.blocks_of_rows());
}

// Blocks of rows to decode, and then channels, some at a time.
void prepare_part(const Convolution& ask, int64_t part, int64_t) {
  const KernelTable* table = chosen.load();
  if (part < ask.blocks_at_once) return table->decode_blocks(ask, part, part + 1);
  const int64_t first = (part - ask.blocks_at_once) * CHANNELS_OF_A_CHUNK;
  table->fill_planes(ask, first, std::min(first + CHANNELS_OF_A_CHUNK, ask.channels + 1));
}

void convolve_all(Convolution ask, int threads) {
  const int64_t kept = blocks_kept(ask), groups = ask.groups_of_positions();
  Uninitialized planes(ask.in_place ? 0 : ask.halves * ask.planes_size());
  Uninitialized weight(ask.halves * kept * ask.rows_of_block * (ask.chunks() + 15) / 16 * 16 * 32);
  ask.planes = ask.in_place ? (uint16_t*)ask.x : planes.data();
  ask.weight = weight.data();
  int64_t of_channels = ask.in_place ? 0 : (ask.channels + CHANNELS_OF_A_CHUNK) / CHANNELS_OF_A_CHUNK;
  for (ask.first_block = 0; ask.first_block < ask.blocks_of_rows(); ask.first_block += kept, of_channels = 0) {
    ask.blocks_at_once = std::min(kept, ask.blocks_of_rows() - ask.first_block);
    const int64_t wanted = ask.in_floats ? GROUPS_OF_A_THREAD * threads / groups : 1;
    ask.parts_of_rows = std::clamp<int64_t>(wanted, 1, ask.blocks_at_once);
    const int64_t parts = groups * ask.parts_of_rows;
    const int64_t at_once = std::clamp<int64_t>(parts / (2 * threads), 1, MOST_GROUPS_OF_A_CHUNK);
    over_both(ask, prepare_part, ask.blocks_at_once + of_channels, chosen.load()->convolve, parts, at_once, threads);
  }
}

}  // namespace

// Inputs as they are.
AQ_EXPORT void aq_convolve(const uint8_t* codes, const uint8_t* scales, const uint8_t* zero_points,
                           const uint16_t* row_scales, int64_t rows, int64_t columns, int bits, int64_t group,
                           int residual, const void* x, int dtype, const ConvolutionSizes* sizes,
                           const float* equalization, const float* bias, void* y, int threads) {
  const Dequantize of = packed(codes, scales, zero_points, row_scales, columns, bits, group);
  const Product product{of, residual != 0, rows, x, (Dtype)dtype, 0, nullptr, nullptr, bias, y};
  const KernelTable* table = chosen.load();
  convolve_all(Convolution(product, *sizes, equalization, table->positions, !table->block_product), threads);
}

AQ_EXPORT void aq_pack(const uint8_t* codes, uint8_t* packed, int64_t rows, int64_t columns, int bits, int threads) {
  const Repack ask{codes, packed, columns, row_bytes_of(columns, bits), bits};
  expect_to_fill(packed, rows * ask.row_bytes);
  over_rows(ask, chosen.load()->pack, rows, columns, threads);
}

AQ_EXPORT void aq_unpack(const uint8_t* packed, uint8_t* codes, int64_t rows, int64_t columns, int bits, int threads) {
  const Repack ask{packed, codes, columns, row_bytes_of(columns, bits), bits};
  expect_to_fill(codes, rows * columns);
  over_rows(ask, chosen.load()->unpack, rows, columns, threads);
}
