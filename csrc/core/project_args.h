// What the kernels that project a source's values are given: plain pointers and sizes. The definition is
// seqkern/seq2seq/reference.py, project_sources.
//
// S source steps, B batch, M size of the memory's values, K key size, A size of the attentional vector. Places of the
// source from a row's length on are projected to zeros, and take no time.
#pragma once
#include "args.h"

namespace seqkern {

struct Projection {
  int64_t columns;   // K or A
  const void* w;     // [columns, M]
  const void* bias;  // [columns] or null
  void* y;           // [B*S, columns]: an output of forward
  // backward
  const void* dy;
  void* dw;  // null with dbias: not wanted
  void* dbias;
};

struct ProjectArgs {
  // The first `rows` of `from` and `to` are places inside the source, the others up to `places` outside.
  int64_t places, rows, input;
  const int64_t* from;  // [S*B] rows of x
  const int64_t* to;    // [S*B] rows of y
  const void* x;        // [S*B, M]
  void* dx;             // [S*B, M]; null: not wanted
  Projection of[2];     // keys, values
  int threads;
  Barrier* barrier;
  char* scratch;
};

struct ProjectKernel {
  int64_t (*scratch)(const ProjectArgs&);
  void (*run)(const ProjectArgs&, int tid);
};
struct ProjectKernels {
  ProjectKernel forward[kDtypes], backward[kDtypes];
};

}  // namespace seqkern
