// Checks of the operators of scan_cells.h, on any device.
#pragma once
#include <string>

#include "args.h"
#include "operands.h"

namespace seqkern {
struct ScanInfo {
  const char* name;
  int64_t gates;
};
constexpr ScanInfo kScans[kScanCells] = {
    {"mingru", 2}, {"mingru_positive", 2}, {"minlstm", 3}, {"minlstm_positive", 3}};

inline int scan_cell(const std::string& name) {
  for (int i = 0; i < kScanCells; ++i)
    if (name == kScans[i].name) return i;
  STD_TORCH_CHECK(false, "cell must be one of mingru, mingru_positive, minlstm, minlstm_positive, got ", name);
}

// Checked arguments: dense, and as args. Outputs are left to the caller.
struct ScanProblem {
  ScanArgs args{};
  int cell, dtype;
  ScalarType sums;  // the type that sums are in
  Tensor p;
  Optional h0, keep;

  ScanProblem(const std::string& name, const Tensor& given, const Optional& h, const Optional& k) : p(dense(given)) {
    cell = scan_cell(name);
    dtype = int(kernel_dtype(name, p.scalar_type()));
    const int64_t g = kScans[cell].gates;
    STD_TORCH_CHECK(p.dim() == 3 && p.size(2) % g == 0 && p.size(0) > 0 && p.size(2) > 0, name, ": p must be [T, B, ", g,
                    "*H] with T and H positive, got ", text(sizes_of(p)));
    args.steps = p.size(0);
    args.batch = p.size(1);
    args.hidden = p.size(2) / g;
    sums = p.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    Wanted{name, p.scalar_type()}.check(h, "h0", "[B, H]", {args.batch, args.hidden});
    Wanted{name, sums}.check(k, "keep", "[T, B]", {args.steps, args.batch});
    if (h) h0 = dense(*h);
    if (k) keep = dense(*k);
    args.p = data(p);
    args.h0 = data(h0);
    args.keep = data(keep);
  }
  void check_backward(const std::string& name, const Tensor& dh, const Tensor& h) const {
    const Wanted want{name, p.scalar_type()};
    want.check(dh, "dh", "[T, B, H]", {args.steps, args.batch, args.hidden});
    want.check(h, "h", "[T, B, H]", {args.steps, args.batch, args.hidden});
  }
};
}  // namespace seqkern
