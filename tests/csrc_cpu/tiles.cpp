// The emulated tile operations against what the Intel SDM says of the instructions. Its argument names the check; one
// that holds prints nothing, and a misuse of tiles ends the program.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "../../csrc/emulation/amx_ops.h"

using namespace wandapp;

namespace {

struct Config {
  uint8_t bytes[64] = {1};

  void set(int tile, int rows, int row_bytes) {
    bytes[16 + 2 * tile] = static_cast<uint8_t>(row_bytes);
    bytes[48 + tile] = static_cast<uint8_t>(rows);
  }
  Config() {
    for (int i = 0; i < 8; ++i) set(i, 16, 64);
  }
};

void expect(bool good, const char* what) {
  if (!good) std::printf("wrong: %s\n", what);
}

Bf16 bf16(float value) { return narrow<Bf16>(value); }

// a[0] * b[0] + a[1] * b[1] + ... for one output, after `start` was there; the other operands are zeros.
float dot(float start, std::initializer_list<float> a, std::initializer_list<float> b) {
  Bf16 left[16][32] = {}, right[16][32] = {};
  float sums[16][16] = {};
  sums[2][3] = start;
  int i = 0;
  for (float value : a) left[2][i++] = bf16(value);
  i = 0;
  for (float value : b) {
    right[i / 2][2 * 3 + i % 2] = bf16(value);
    ++i;
  }
  const Config config;
  configure_tiles(config.bytes);
  load_tile<1>(sums, 64);
  load_tile<5>(left, 64);
  load_tile<7>(right, 64);
  multiply_tiles<1, 5, 7>();
  store_tile<1>(sums, 64);
  release_tiles();
  // Infinity times the zeros of the row's other outputs is not a number either.
  const bool number = sums[2][3] == sums[2][3];
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      const bool skipped = row == 2 && (column == 3 || !number);
      expect(skipped || sums[row][column] == 0, "an output that nothing was added to");
    }
  }
  return sums[2][3];
}

// C += A B with every size smaller than a tile, of small whole numbers, so that no sum is rounded.
void products() {
  constexpr int kRows = 5, kColumns = 7, kPairs = 6;
  Bf16 a[kRows][2 * kPairs], b[kPairs][2 * kColumns];
  float sums[kRows][kColumns + 1];
  int next = 1;
  const auto number = [&next] { return static_cast<float>((next = next * 37 % 101) % 17 - 8); };
  for (auto& row : a) {
    for (Bf16& value : row) value = bf16(number());
  }
  for (auto& row : b) {
    for (Bf16& value : row) value = bf16(number());
  }
  for (auto& row : sums) {
    for (float& value : row) value = number();
  }
  float want[kRows][kColumns + 1];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j <= kColumns; ++j) {
      want[i][j] = sums[i][j];
      for (int k = 0; k < 2 * kPairs && j < kColumns; ++k) want[i][j] += widen(a[i][k]) * widen(b[k / 2][2 * j + k % 2]);
    }
  }
  Config config;
  config.set(0, kRows, 4 * kColumns);
  config.set(1, kRows, 4 * kPairs);
  config.set(2, kPairs, 4 * kColumns);
  configure_tiles(config.bytes);
  load_tile<0>(sums, sizeof(sums[0]));
  load_tile<1>(a, sizeof(a[0]));
  load_tile<2>(b, sizeof(b[0]));
  multiply_tiles<0, 1, 2>();
  store_tile<0>(sums, sizeof(sums[0]));
  expect(std::memcmp(sums, want, sizeof(want)) == 0, "a product, or something beside it was written");
  zero_tile<0>();
  store_tile<0>(sums, sizeof(sums[0]));
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j <= kColumns; ++j) expect(sums[i][j] == (j < kColumns ? 0 : want[i][j]), "zeros");
  }
  release_tiles();
}

void rounding() {
  const float tiny = 0x1p-133f, huge = 0x1p24f;  // the smallest subnormal bf16; 1 more needs 25 bits
  expect(dot(0, {tiny}, {0x1p100f}) == 0, "a subnormal weight counts as zero");
  expect(dot(0, {0x1p100f}, {-tiny}) == 0, "a subnormal activation counts as zero");
  expect(dot(0, {0x1p-70f}, {0x1p-60f}) == 0, "a subnormal result is zero");
  expect(dot(0x1p-130f, {0}, {0}) == 0, "a subnormal sum counts as zero");
  // Even and odd products have sums of their own: each 1 is lost beside a huge number, not beside another 1.
  expect(dot(0, {huge, 1, 1, 1}, {1, 1, 1, 1}) == huge + 2, "even and odd products are summed apart");
  expect(dot(huge, {1, 1, 1}, {1, 1, 0}) == huge + 2, "products are summed before they are added");
  expect(dot(0, {huge, 0, 1}, {1, 0, 1}) == huge, "ties go to even");
  expect(dot(0, {huge, 0, 3}, {1, 0, 1}) == huge + 4, "ties go to even, upwards");
  const float infinity = float_of(0x7f800000u);
  const float none = dot(0, {infinity, tiny}, {tiny, 1});
  expect(none != none, "infinity times a subnormal number is infinity times zero");
}

void misuse(const std::string& how) {
  Config config;
  if (how == "ninth") config.set(8, 1, 4);
  if (how == "palette") config.bytes[0] = 2;
  if (how == "rows") config.set(3, 17, 64);
  if (how == "reserved") config.bytes[5] = 1;
  if (how == "sizes") config.set(5, 16, 32);
  if (how != "unconfigured") configure_tiles(config.bytes);
  if (how == "twice") configure_tiles(config.bytes);
  zero_tile<0>();
  multiply_tiles<0, 5, 6>();
  if (how != "unreleased") release_tiles();
}

}  // namespace

int main(int, char** arguments) {
  const std::string check = arguments[1];
  if (check == "products") {
    products();
  } else if (check == "rounding") {
    rounding();
  } else {
    misuse(check);
  }
  return EXIT_SUCCESS;
}
