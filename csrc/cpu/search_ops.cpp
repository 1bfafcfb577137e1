// The operators of the compiled searches on CPU tensors: check, allocate, share out the sources, call the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "../core/box.h"
#include "../core/operands.h"
#include "dispatch.h"
#include "execute.h"

namespace seqkern {
namespace {
using Ints = std::vector<int64_t>;

const SearchKernel& kernel_of(const SearchShape& s) { return search_kernels().of[s.dtype]; }

int64_t attend_of(const std::string& name) {
  if (name == "none") return int64_t(Attend::kNone);
  if (name == "dot") return int64_t(Attend::kDot);
  STD_TORCH_CHECK(name == "additive", "search: attention must be one of none, dot, additive, got ", name);
  return int64_t(Attend::kAdditive);
}
Dtype search_dtype(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double,
                  "search: weights must be float32 or float64, got ", dtype_name(t.scalar_type()));
  return t.scalar_type() == ScalarType::Float ? Dtype::kF32 : Dtype::kF64;
}

// A step reads all of it; translating addresses of 4 KiB pages would halve the rate.
void large_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t end = uintptr_t(data(t)) + uintptr_t(t.numel()),
                  begin = (uintptr_t(data(t)) + kPage - 1) / kPage * kPage;
  if (end >= begin + kPage) madvise((void*)begin, (end - begin) / kPage * kPage, MADV_HUGEPAGE);
#endif
}

// table [V, G*H] or empty; w_ih [G*H, ...] or empty, b_ih [G*H]; layers w_hh, b_hh and for those above w_ih, w_hh,
// b_ih, b_hh; sources [w_context], [w_context, w_key] or [w_context, w_key, b_key], query [w_query, v] and pre [w_pre,
// b_pre] or empty; out [w_out, b_out]; embedding: E, 0 with a table.
Tensor search_pack(Tensor table, Tensor w_ih, Tensor b_ih, Tensors layers, Tensors sources, Tensors query, Tensors pre,
                   Tensors out, std::string cell, std::string attention, int64_t embedding) {
  const CellInfo& info = cell_info(cell);
  STD_TORCH_CHECK(
      layers.size() >= 2 && layers.size() % 4 == 2 && layers.size() <= 4 * kMaxSearchLayers - 2 && layers[0].dim() == 2,
      "search: layers must be w_hh, b_hh and then w_ih, w_hh, b_ih, b_hh of at most ", kMaxSearchLayers - 1,
      " further layers, got ", layers.size(), " tensors");
  STD_TORCH_CHECK(out.size() == 2 && out[0].dim() == 2, "search: out must be w_out and b_out, got ", out.size(),
                  " tensors");
  STD_TORCH_CHECK((pre.size() == 0 || pre.size() == 2) && (query.size() == 0 || query.size() == 2),
                  "search: pre must be w_pre, b_pre or empty, query w_query, v or empty, got ", pre.size(), " and ",
                  query.size(), " tensors");
  SearchShape s{};
  s.magic = kSearchMagic;
  s.vector_bytes = search_kernels().vector_bytes;
  s.dtype = int64_t(search_dtype(out[0]));
  s.cell = int64_t(info.cell);
  s.gates = info.gates;
  s.vocab = out[0].size(0);
  s.hidden = layers[0].size(1);
  s.layers = int64_t(layers.size() + 2) / 4;
  s.attend = attend_of(attention);
  s.key = query.empty() ? s.hidden : query[0].size(0);
  s.memory = sources.empty() ? 0 : sources[0].size(1);
  s.keyed = sources.size() > 1;
  s.pre = pre.empty() ? 0 : pre[0].size(0);
  s.folded = embedding == 0;
  s.embed = embedding;
  const bool attends = Attend(s.attend) != Attend::kNone;
  STD_TORCH_CHECK(attends == !sources.empty() && sources.size() <= 3 && (!attends || s.pre > 0),
                  "search: w_context, w_key and b_key belong to attention, which needs w_context and w_pre, got ",
                  sources.size(), " tensors for ", attention);
  STD_TORCH_CHECK(!attends || s.keyed || s.memory == s.key, "search: without w_key M must be K = ", s.key, ", got ",
                  s.memory);
  STD_TORCH_CHECK((Attend(s.attend) == Attend::kAdditive) == !query.empty(),
                  "search: w_query and v belong to additive attention, got ", query.size(), " tensors for ", attention);
  const int64_t gh = s.gates * s.hidden, fed = w_ih.numel() ? w_ih.size(1) - embedding : 0;
  s.feed = fed > 0;
  Wanted want{"search", out[0].scalar_type()};
  const auto check = [&](Tensor& t, const char* name, const char* letters, const Ints& sizes) {
    want.check(t, name, letters, sizes);
    t = dense(t);
  };
  if (s.folded) check(table, "table", "[V, G*H]", {s.vocab, gh});
  if (w_ih.numel()) check(w_ih, "w_ih", "[G*H, E + A]", {gh, embedding + (s.feed ? s.pre : 0)});
  if (!s.folded) check(b_ih, "b_ih", "[G*H]", {gh});
  for (size_t i = 0; i < layers.size(); ++i) {
    const bool matrix = i == 0 || (i > 1 && (i - 2) % 4 < 2);
    check(layers[i], matrix ? "a layer's weight" : "a layer's bias", matrix ? "[G*H, H]" : "[G*H]",
          matrix ? Ints{gh, s.hidden} : Ints{gh});
  }
  if (attends) check(sources[0], "w_context", "[A, M]", {s.pre, s.memory});
  if (s.keyed) check(sources[1], "w_key", "[K, M]", {s.key, s.memory});
  if (sources.size() > 2) check(sources[2], "b_key", "[K]", {s.key});
  if (!query.empty()) {
    check(query[0], "w_query", "[K, H]", {s.key, s.hidden});
    check(query[1], "v", "[K]", {s.key});
  }
  if (!pre.empty()) {
    check(pre[0], "w_pre", "[A, H]", {s.pre, s.hidden});
    check(pre[1], "b_pre", "[A]", {s.pre});
  }
  check(out[0], "w_out", s.pre ? "[V, A]" : "[V, H]", {s.vocab, s.read()});
  check(out[1], "b_out", "[V]", {s.vocab});

  SearchWeights w{};
  w.table = data(table);
  w.w_ih = data(w_ih);
  w.b_ih = data(b_ih);
  for (size_t i = 0; i < layers.size(); ++i) w.layers[i] = data(layers[i]);
  w.w_context = attends ? data(sources[0]) : nullptr;
  w.w_key = s.keyed ? data(sources[1]) : nullptr;
  w.b_key = sources.size() > 2 ? data(sources[2]) : nullptr;
  w.w_query = query.empty() ? nullptr : data(query[0]);
  w.v = query.empty() ? nullptr : data(query[1]);
  w.w_pre = pre.empty() ? nullptr : data(pre[0]);
  w.b_pre = pre.empty() ? nullptr : data(pre[1]);
  w.w_out = data(out[0]);
  w.b_out = data(out[1]);
  const SearchKernel& kernel = kernel_of(s);
  const int64_t bytes = kernel.packed_bytes(s);
  Tensor packed = torch::stable::new_empty(out[0], {bytes}, ScalarType::Byte);
  large_pages(packed);
  constexpr int64_t kBytesPerThread = 1 << 18;
  const int64_t parts =
      std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), bytes / kBytesPerThread));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel.pack(s, w, (char*)data(packed), int(i), int(parts));
  });
  return packed;
}

const SearchShape& shape_of(const Tensor& packed) {
  const SearchShape& s = *(const SearchShape*)data(packed);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.size(0) >= kSearchHeader &&
                      s.magic == kSearchMagic && s.vector_bytes == search_kernels().vector_bytes &&
                      packed.size(0) == kernel_of(s).packed_bytes(s),
                  "search: packed must be what search_pack made in this process, got ", text(sizes_of(packed)), " ",
                  dtype_name(packed.scalar_type()));
  return s;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // tokens, lengths, scores, attention

// What all searches are given, checked; and their results.
struct SearchCall {
  SearchArgs a{};
  SearchShape s;
  Tensor packed, lengths, h0, tokens, found, scores, attention, parents, chosen, weights;
  Optional embedding, memory, c0;
  ScalarType dtype;

  SearchCall(const Tensor& pack, const Optional& e, const Optional& m, const Tensor& n, const Tensor& h,
             const Optional& c, const Ints& ids, int64_t max_len)
      : s(shape_of(pack)),
        packed(pack),
        lengths(dense(n)),
        h0(dense(h)),
        embedding(dense(e)),
        memory(dense(m)),
        c0(dense(c)) {
    dtype = Dtype(s.dtype) == Dtype::kF32 ? ScalarType::Float : ScalarType::Double;
    STD_TORCH_CHECK(lengths.dim() == 1 && lengths.scalar_type() == ScalarType::Long && lengths.is_cpu(),
                    "search: lengths must be [B] int64 on the CPU, got ", text(sizes_of(lengths)));
    STD_TORCH_CHECK(ids.size() == 3 && max_len >= 1, "search: ids must be pad, bos, eos and max_len at least 1, got ",
                    text(ids), " and ", max_len);
    for (int64_t id : ids)
      STD_TORCH_CHECK(id >= 0 && id < s.vocab, "search: pad, bos and eos must be in [0, V) = [0, ", s.vocab, "), got ",
                      text(ids));
    a.batch = lengths.size(0);
    Wanted want{"search", dtype};
    want.check(h0, "h0", "[L, B, H]", {s.layers, a.batch, s.hidden});
    STD_TORCH_CHECK(c0.has_value() == (Cell(s.cell) == Cell::kLstm),
                    "search: c0 belongs to the LSTM, and it needs one");
    want.check(c0, "c0", "[L, B, H]", {s.layers, a.batch, s.hidden});
    const bool attends = Attend(s.attend) != Attend::kNone;
    STD_TORCH_CHECK(attends == memory.has_value(),
                    "search: memory belongs to a decoder with attention, and it needs it");
    if (attends) {
      STD_TORCH_CHECK(memory->dim() == 3, "search: memory must be [S, B, M], got ", text(sizes_of(*memory)));
      a.places = memory->size(0);
      want.check(memory, "memory", "[S, B, M]", {a.places, a.batch, s.memory});
    }
    STD_TORCH_CHECK(embedding.has_value() != bool(s.folded),
                    "search: the embedding belongs to a decoder packed without its table");
    want.check(embedding, "embedding", "[V, E]", {s.vocab, s.embed});
    a.packed = (const char*)data(packed);
    a.embedding = data(embedding);
    a.memory = data(memory);
    a.lengths = (const int64_t*)data(lengths);
    a.h0 = data(h0);
    a.c0 = data(c0);
    a.pad = ids[0];
    a.bos = ids[1];
    a.eos = ids[2];
    a.max_len = max_len;
    a.temperature = a.top_p = 1;
    a.beam = a.n_best = 1;
  }
  void allocate(bool wants_attention) {
    tokens = torch::stable::new_empty(lengths, {a.n_best, a.max_len, a.batch});
    std::fill_n((int64_t*)data(tokens), tokens.numel(), a.pad);
    const bool beam = a.search == Search::kBeam;
    found = torch::stable::new_empty(lengths, {a.n_best, a.batch});
    std::fill_n((int64_t*)data(found), found.numel(), beam ? -1 : 0);
    scores = torch::stable::new_empty(lengths, {a.n_best, a.batch}, ScalarType::Double);
    std::fill_n((double*)data(scores), scores.numel(), beam ? -std::numeric_limits<double>::infinity() : 0.);
    const bool records = wants_attention && memory;
    attention = torch::stable::new_zeros(h0, records ? Ints{a.n_best, a.max_len, a.batch, a.places} : Ints{0});
    a.tokens = (int64_t*)data(tokens);
    a.found_lengths = (int64_t*)data(found);
    a.scores = (double*)data(scores);
    a.attention = records ? data(attention) : nullptr;
    if (!beam) return;
    const Ints sizes{a.max_len + 1, a.batch, a.beam};
    parents = torch::stable::new_empty(lengths, sizes, ScalarType::Int);
    chosen = torch::stable::new_empty(lengths, sizes, ScalarType::Int);
    a.parents = (int32_t*)data(parents);
    a.chosen = (int32_t*)data(chosen);
    if (!records) return;
    weights = torch::stable::new_empty(h0, {a.max_len + 1, a.batch, a.beam, a.places});
    a.weights = data(weights);
  }
  // Bytes of weights that a step reads.
  int64_t step_bytes() const {
    return packed.size(0) - (s.folded ? s.vocab * s.gates * s.hidden * (dtype == ScalarType::Float ? 4 : 8) : 0);
  }

  // Sources of one loop: enough rows to use what is read of the weights well, and few enough to stay near with their
  // states, and with their keys and values within the scratch memory that is kept.
  static constexpr int64_t kRows = 192;
  int64_t sources_at_once() const {
    return std::max<int64_t>(1, std::min(kRows / a.beam, kMostKept / kernel_of(s).scratch(a, 1, 1)));
  }

  Results run() {
    if (a.batch) {
      // Threads that share rows meet several times a step; that pays where there are few rows, and more weights than a
      // core's own cache holds.
      constexpr int64_t kNear = 3 << 19, kFewRows = 8;
      const int64_t threads = torch::stable::get_num_threads();
      const bool few = a.batch < threads || a.batch * a.beam < kFewRows * threads;
      const bool together = threads > 1 && step_bytes() > kNear && few;
      if (!together || !run_as_team(int(threads))) run_apart(threads);
    }
    return {tokens, found, scores, attention};
  }
  bool run_as_team(int threads) {
    const SearchKernel& kernel = kernel_of(s);
    Barrier barrier{};
    Scratch own;
    SearchPart part{0, a.batch, 0, threads, &barrier, memory_for(kernel.scratch(a, a.batch, threads), own)};
    return run_together(threads, [&](int tid) {
      SearchPart mine = part;
      mine.member = tid;
      kernel.run(a, mine);
    });
  }
  void run_apart(int64_t threads) {
    const SearchKernel& kernel = kernel_of(s);
    const int64_t each = std::min(sources_at_once(), (a.batch + threads - 1) / threads),
                  parts = (a.batch + each - 1) / each;
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      Barrier barrier{};
      Scratch own;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * each, last = std::min(a.batch, first + each);
        kernel.run(a, {first, last, 0, 1, &barrier, memory_for(kernel.scratch(a, last - first, 1), own)});
      }
    });
  }
  static char* memory_for(int64_t bytes, Scratch& own) {
    static thread_local Scratch kept;
    return (bytes <= kMostKept ? kept : own).take(bytes);
  }
};

Results search_greedy(Tensor packed, Optional embedding, Optional memory, Tensor lengths, Tensor h0, Optional c0,
                      Optional forced, Ints ids, int64_t max_len, bool attention) {
  SearchCall call(packed, embedding, memory, lengths, h0, c0, ids, max_len);
  call.a.search = Search::kGreedy;
  call.allocate(attention);
  if (forced) {
    forced = dense(*forced);
    STD_TORCH_CHECK(forced->scalar_type() == ScalarType::Long && sizes_of(*forced) == Ints({max_len + 1, call.a.batch}),
                    "search: forced must be [max_len + 1, B] = [", max_len + 1, ", ", call.a.batch, "] int64, got ",
                    text(sizes_of(*forced)));
    const int64_t* from = (const int64_t*)data(*forced);
    for (int64_t i = 0; i < forced->numel(); ++i)
      STD_TORCH_CHECK(from[i] >= (i < call.a.batch ? 0 : -1) && from[i] < call.s.vocab,
                      "search: forced must hold tokens in [0, V) = [0, ", call.s.vocab,
                      "), or -1 after the first step, got ", from[i]);
    std::copy(from + call.a.batch, from + forced->numel(), call.a.tokens);
    call.a.forced = from;
  }
  return call.run();
}

Results search_sample(Tensor packed, Optional embedding, Optional memory, Tensor lengths, Tensor h0, Optional c0,
                      Tensor seed, Ints ids, int64_t max_len, double temperature, int64_t top_k, double top_p) {
  SearchCall call(packed, embedding, memory, lengths, h0, c0, ids, max_len);
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "search: seed must be [1] int64, got ",
                  text(sizes_of(seed)));
  STD_TORCH_CHECK(temperature > 0 && top_k >= 0 && top_p > 0 && top_p <= 1,
                  "search: temperature must be above 0, top_k at least 0, top_p in (0, 1], got ", temperature, ", ",
                  top_k, ", ", top_p);
  call.a.search = Search::kSample;
  call.a.seed = *(const int64_t*)data(seed);
  call.a.temperature = temperature;
  call.a.top_k = top_k >= call.s.vocab ? 0 : top_k;
  call.a.top_p = top_p;
  call.allocate(false);
  return call.run();
}

// options: beam, n_best, max_len, min_len.
Results search_beam(Tensor packed, Optional embedding, Optional memory, Tensor lengths, Tensor h0, Optional c0,
                    Ints ids, Ints options, double length_penalty, double coverage_penalty, bool early_stop,
                    bool attention) {
  STD_TORCH_CHECK(
      options.size() == 4 && *std::min_element(options.begin(), options.begin() + 3) >= 1 && options[3] >= 0 &&
          options[3] <= options[2] && length_penalty >= 0 && coverage_penalty >= 0,
      "search: beam, n_best and max_len must be at least 1, min_len in [0, max_len], penalties at least 0, got ",
      text(options), ", ", length_penalty, ", ", coverage_penalty);
  SearchCall call(packed, embedding, memory, lengths, h0, c0, ids, options[2]);
  call.a.search = Search::kBeam;
  call.a.beam = options[0];
  call.a.n_best = options[1];
  call.a.min_len = options[3];
  call.a.length_penalty = length_penalty;
  call.a.coverage_penalty = coverage_penalty;
  call.a.early_stop = early_stop;
  call.allocate(attention);
  return call.run();
}

// Bytes of scratch memory of a beam search on one thread, per loop.
int64_t search_scratch(Tensor packed, int64_t sources, int64_t places, int64_t beam) {
  shape_of(packed);
  SearchArgs a{};
  a.packed = (const char*)data(packed);
  a.places = places;
  a.search = Search::kBeam;
  a.beam = beam;
  a.n_best = 1;
  a.temperature = a.coverage_penalty = 1;
  return kernel_of(*(const SearchShape*)a.packed).scratch(a, sources, 1);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
  m.impl("search_pack", SK_BOX(search_pack));
  m.impl("search_greedy", SK_BOX(search_greedy));
  m.impl("search_sample", SK_BOX(search_sample));
  m.impl("search_beam", SK_BOX(search_beam));
  m.impl("_search_scratch", SK_BOX(search_scratch));
}
}  // namespace seqkern
