// The kernels of recurrence.h, compiled once per instruction set; see kernels.cpp.
#include <stdint.h>
#include <string.h>
#include "recurrence_backward.h"
#include "recurrence_forward.h"

namespace seqkern { namespace SK_NS {
namespace {
template <class T> int64_t recurrence_scratch(const RecurrenceArgs& a, bool backward, int64_t rows) {
  Arena m{nullptr};
  const RecurrencePart part{};
  if (backward) RecurrenceBackward<T>(a, part).take(m, rows);
  else RecurrenceForward<T>(a, part).take(m, rows);
  return m.used;
}
template <class T> void recurrence_run(const RecurrenceArgs& a, bool backward, const RecurrencePart& part) {
  if (backward) RecurrenceBackward<T>(a, part).run();
  else RecurrenceForward<T>(a, part).run();
}
template <class T>
constexpr RecurrenceKernel kRecurrence{&Recurrence<T>::packed_bytes, &Recurrence<T>::panels, &Recurrence<T>::pack,
                                       &recurrence_scratch<T>, &recurrence_run<T>};
}  // namespace

extern const RecurrenceKernels kRecurrences;
const RecurrenceKernels kRecurrences = {kRecurrence<double>, kRecurrence<float>};

}}  // namespace seqkern::SK_NS
