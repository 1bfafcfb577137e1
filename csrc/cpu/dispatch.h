// Which build of the kernels this process uses.
#pragma once
#include <string>
#include "../core/args.h"
#include "../core/decoder_args.h"
#include "../core/project_args.h"
#include "../core/search_args.h"

namespace seqkern {
// The fastest that this CPU runs, or the one that SEQKERN_CPU_ISA names (generic, avx2, avx512, avx512_bf16, amx). Chosen
// once; a name that is unknown or that this CPU cannot run is an error.
const CpuKernels& cpu_kernels();
const CpuKernels& vector_kernels();  // the same, but for a CPU with a tile unit those that leave it alone
// The same for one row of bf16: it waits for its weights, so that dot products win however slow, as nothing is widened.
const CpuKernels& row_kernels();
const DecoderKernels& decoder_kernels();
const ProjectKernels& project_kernels();
const SearchKernels& search_kernels();
const RecurrenceKernels& cpu_recurrences();
std::string cpu_isas();  // those that this CPU can run, best last, separated by spaces
}
