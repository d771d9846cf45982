// Tests of cpu/attend*.h.

#include <map>
#include <random>
#include <tuple>

#include "cpu/attend.h"
#include "cpu/attend_plan.h"
#include "expect.h"

using namespace pa;

namespace {

using Spec =
    SpecOf<3, false>;  // ranges of 3 blocks of 4 tokens; items of up to 4 tiles of 4 rows, 2 heads to a kv head
using Windowed = SpecOf<3, false, 9>;

// Lengths of sequences, and of their query tokens.
struct Lengths {
  std::vector<int32_t> lens, starts = {0};

  Lengths(std::initializer_list<std::pair<int, int>> sequences) {
    for (const auto& [count, len] : sequences) Add(count, len);
  }
  void Add(int32_t count, int32_t len) {
    lens.push_back(len);
    starts.push_back(starts.back() + count);
  }
  Queries With(bool causal = true, const uint8_t* tree_mask = nullptr) const {
    return {lens.data(), starts.data(), static_cast<int64_t>(lens.size()), causal, tree_mask};
  }
};

Lengths Drawn(std::mt19937& random) {
  Lengths drawn({});
  const int batch = static_cast<int>(random() % 7);
  for (int seq = 0; seq < batch; ++seq) {
    const int counts[] = {0, 1, 1, 2, 3, 8, 9, 40}, count = counts[random() % 8];
    drawn.Add(count, count + static_cast<int>(random() % 70));
  }
  return drawn;
}

// Each block that a query token sees is in one item with each kv head, and in none twice; each token is in an item.
template <typename Spec>
void ExpectCoverage(const Queries& queries, const AttendPlan<Spec>& plan) {
  std::map<std::tuple<int64_t, int64_t, int64_t>, int> visits;  // token, kv head, block
  std::map<std::pair<int64_t, int64_t>, int> rows;
  for (int64_t i = 0; i < plan.num_dealt; ++i) {
    if (const WorkItem* one = plan.OfDecode(i)) {
      for (int64_t seq = one->batch_start; seq < one->batch_start + one->num_seqs; ++seq) {
        EXPECT(queries.Count(seq) == 1 &&
               queries.Begin(seq) - seq == queries.Begin(one->batch_start) - one->batch_start);
        for (int64_t head = 0; head < 2; ++head) {
          ++rows[{queries.Begin(seq), head}];
          for (int64_t block = one->block_begin; block < one->block_end; ++block) {
            ++visits[{queries.Begin(seq), head, block}];
          }
        }
      }
      continue;
    }
    const AttendItem& item = plan.item(i);
    EXPECT(item.first_pos == queries.FirstPos(item.seq) + item.token_begin - queries.Begin(item.seq));
    for (int64_t token = item.token_begin; token < item.token_begin + item.num_query; ++token) {
      EXPECT(queries.Begin(item.seq) <= token && token < queries.Begin(item.seq + 1));
      for (int64_t head = item.kv_head_begin; head < item.kv_head_begin + item.num_kv_heads; ++head) {
        ++rows[{token, head}];
        for (int64_t block = item.block_begin; block < item.block_end; ++block) ++visits[{token, head, block}];
      }
    }
  }
  for (int64_t seq = 0; seq < queries.batch; ++seq) {
    for (int64_t token = queries.Begin(seq); token < queries.Begin(seq + 1); ++token) {
      const Interval blocks = BlocksOf<Spec>(SeenTogether<Spec>(queries, seq, token - queries.Begin(seq), 1).keys);
      for (int64_t head = 0; head < 2; ++head) {
        EXPECT((rows[{token, head}] > 0));
        for (int64_t block = blocks.begin; block < blocks.end; ++block) EXPECT((visits[{token, head, block}] >= 1));
      }
    }
  }
  for (const auto& visit : visits) EXPECT(visit.second == 1);
}

// Items fit into the kernels' scratch, leave their results in slots of their own, and are in the order of their work.
template <typename Spec>
void ExpectItems(const AttendPlan<Spec>& plan, int64_t most_threads) {
  EXPECT(plan.num_threads >= 1 && plan.num_threads <= most_threads);
  std::map<std::pair<int64_t, int64_t>, int> slots;  // slot, kv head
  std::map<int64_t, int64_t> of_merge;
  int64_t work = INT64_MAX;
  for (int64_t i = 0; i < plan.num_dealt; ++i) {
    if (plan.OfDecode(i) != nullptr) continue;
    const AttendItem& item = plan.item(i);
    EXPECT(item.num_kv_heads * ((item.num_query * Spec::kGroup + 3) / 4) <= Spec::kAttendTiles);
    EXPECT(item.work <= work && item.num_query > 0 && item.num_kv_heads > 0);
    work = item.work;
    if (item.partial_start < 0) continue;
    EXPECT(plan.num_threads > 1);
    EXPECT(item.block_begin / 3 == (item.block_end - 1) / 3);  // one range
    ++of_merge[item.merge];
    for (int64_t token = 0; token < item.num_query; ++token) {
      const int64_t slot = item.partial_start + token, range = (slot - item.merge_start - token) / item.num_query;
      EXPECT((slot - item.merge_start - token) % item.num_query == 0 && range < item.num_ranges);
      EXPECT(slot < plan.num_partials);
      for (int64_t head = 0; head < item.num_kv_heads; ++head) {
        EXPECT((++slots[{slot, item.kv_head_begin + head}] == 1));
      }
    }
  }
  for (const auto& [merge, items] : of_merge) EXPECT(plan.ItemsOf(merge) == items);
  EXPECT(static_cast<int64_t>(slots.size()) == 2 * (plan.num_partials - plan.decode.num_partials));
}

template <typename Spec>
void TestPlans(bool causal) {
  std::mt19937 random(1);
  for (int i = 0; i < 300; ++i) {
    const Lengths lengths = Drawn(random);
    const Queries queries = lengths.With(causal);
    for (const int64_t threads : {1, 2, 8}) {
      const AttendPlan<Spec> plan(queries, threads), again(queries, threads);
      if (Spec::kWindow >= 0) ExpectCoverage(queries, plan);
      ExpectItems(plan, threads);
      for (int64_t item = 0; item < plan.num_dealt; ++item) {
        EXPECT((plan.OfDecode(item) == nullptr) == (again.OfDecode(item) == nullptr));
        if (plan.OfDecode(item) != nullptr) continue;
        EXPECT(std::memcmp(&plan.item(item), &again.item(item), sizeof(AttendItem)) == 0);
      }
    }
  }
}

void TestShares() {
  for (const auto& [count, tokens, heads] :
       {std::tuple{2, 2, 2}, {4, 4, 2}, {5, 6, 1}, {8, 8, 1}, {9, 6, 1}, {17, 6, 1}}) {
    const Shares<Spec> shares(count);
    EXPECT(shares.tokens == tokens && shares.heads == heads);
  }
}

// Work of a triangle is half of that of a square; what is read counts where there is little to compute.
void TestWork() {
  AttendItem item = {};
  item.num_query = 32, item.num_kv_heads = 1;
  const int64_t square = WorkOf<Spec>(item, {0, 32}, true), triangle = WorkOf<Spec>(item, {0, 32}, false);
  EXPECT(square == 2 * 9 * 64 * 32 && triangle == 2 * 9 * 4 * 2 * (16 * 17 / 2));
  item.num_query = 1;
  EXPECT(WorkOf<Spec>(item, {0, 8}, true) == kFlopsOfByte * 9 * 4 * 8 && WorkOf<Spec>(item, {8, 8}, true) == 0);
  item.first_pos = 100, item.num_query = 2, item.num_kv_heads = 2;
  EXPECT(WorkOf<Spec>(item, {96, 102}, false) == 2 * kFlopsOfByte * 9 * 4 * 6);
}

// A long context of few rows is divided where there are threads for it, and then at the multiples of a range.
void TestSplits() {
  const Lengths lengths({{2, 100}, {1, 50}, {0, 7}});
  EXPECT(AttendPlan<Spec>(lengths.With(), 1).num_dealt == 1 + 5);  // the one of decode is cut, as ever
  const AttendPlan<Spec> plan(lengths.With(), 4);
  EXPECT(plan.num_partials == 5 + 2 * 9 && plan.num_merges == 3 + 1 && plan.ItemsOf(1) == 5);
  int64_t begins = 0;
  for (int64_t i = 0; i < plan.num_dealt; ++i) {
    if (plan.OfDecode(i) == nullptr && plan.item(i).kv_head_begin == 0) begins += plan.item(i).block_begin;
  }
  EXPECT(begins == 3 * (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8));
}

void TestWindows() {
  const Lengths four({{4, 24}, {27, 30}}), two({{2, 101}}), three({{41, 140}});
  const Interval together = SeenTogether<Windowed>(four.With(), 0, 0, 4).keys;
  EXPECT(together.begin == 12 && together.end == 24);
  const Interval ahead = SeenTogether<Windowed>(four.With(false), 1, 0, 1).keys;
  EXPECT(ahead.begin == 0 && ahead.end == 30);
  const SeenTogether<Union> seen(two.With(), 0, 0, 2);
  EXPECT(seen.keys.begin == 0 && seen.keys.end == 101 && seen.count == 3);
  EXPECT(seen.blocks[1].begin == 10 && seen.blocks[1].end == 12 && seen.blocks[2].begin == 24 &&
         seen.blocks[2].end == 26);
  EXPECT(SeenTogether<Union>(three.With(false), 0, 0, 2).blocks[2].end == 35);
  EXPECT(SeenTogether<NoKeys>(four.With(), 0, 0, 2).keys.end == 0 &&
         SeenTogether<NoKeys>(four.With(), 0, 0, 2).count == 0);
  EXPECT((BlocksOf<Spec>({3, 3}).end == 0 && BlocksOf<Spec>({3, 5}).begin == 0 && BlocksOf<Spec>({4, 5}).end == 2));
  const Lengths lengths({{2, 100}});
  const AttendPlan<Windowed> plan(lengths.With(), 1);
  EXPECT(plan.item(0).block_begin == 22 && plan.item(0).block_end == 25);  // from token 90 on
}

// A single query token that its tree hides from itself is none of decode's.
void TestTrees() {
  const Lengths lengths({{1, 9}, {2, 9}, {1, 9}});
  const uint8_t mask[] = {0, 1, 0, 1, 1, 1};
  const AttendPlan<Spec> plan(lengths.With(true, mask), 1);
  EXPECT(plan.num_dealt == 3 && plan.decode.num_items == 1 && plan.decode.item(0).batch_start == 2);
  for (int64_t i = 0; i < 3; ++i) {
    if (plan.OfDecode(i) != nullptr) continue;
    const AttendItem& item = plan.item(i);
    EXPECT(item.tree_start == item.seq && item.tree_size == (item.seq == 0 ? 1 : 2));
  }
  const Lengths tiles({{1, 9}, {20, 20}});
  const std::vector<uint8_t> all(401, 1);
  const AttendPlan<Spec> cut(tiles.With(true, all.data()), 1);
  for (int64_t i = 0; i < cut.num_dealt; ++i) {
    if (cut.OfDecode(i) == nullptr) EXPECT(cut.item(i).tree_start == 1 + 20 * cut.item(i).first_pos);
  }
  EXPECT(AttendPlan<Spec>(tiles.With(), 1).item(0).tree_start == -1);
}

// A call with int64 indices, from arrays that are contiguous.
void TestCall() {
  Made query(kFloat32, {4, 4, 6}), keys(kFloat32, {9, 4, 2, 6}), values(kFloat32, {9, 4, 2, 3});
  Made table(kInt64, {2, 8}), lens(kInt64, {2}), starts(kInt64, {3}), out(kFloat32, {4, 4, 3}), tree(kBool, {10});
  auto* const len = lens.data<int64_t>();
  auto* const start = starts.data<int64_t>();
  len[0] = 5, len[1] = 30, start[1] = 3, start[2] = 4;
  for (int i = 0; i < 16; ++i) table.data<int64_t>()[i] = i < 2 || i > 7 ? i % 9 : 99;
  std::fill_n(tree.data<char>(), 10, 1);
  TVMFFIAny none{};
  TVMFFIAny given[] = {Any(query.tensor),
                       Any(keys.tensor),
                       Any(values.tensor),
                       Any(table.tensor),
                       none,
                       none,
                       Any(lens.tensor),
                       Any(starts.tensor),
                       Any(out.tensor),
                       none,
                       none,
                       none,
                       none,
                       none,
                       Any(tree.tensor),
                       Packed(1.0f),
                       Any(1),
                       Packed(int64_t{8}),
                       Any(kOwn),
                       Any(0),
                       Any(0)};
  {
    const AttendCall<Spec> call(Inputs(given, 21, 21));
    EXPECT(call.plan.num_dealt == 2 + 3 && call.plan.decode.num_partials == 3 && call.args.batch == 2);
    EXPECT(call.queries.Count(0) == 3 && call.queries.FirstPos(0) == 2 && call.args.lse.shape[0] == 4);
    const DecodeArguments rows =
        RowsOf(call.args, call.queries, call.plan.decode.item(0));  // of sequence 1, which has token 3
    EXPECT(static_cast<float*>(rows.query.tensor.data) == query.data<float>() + 2 * 24);
    EXPECT(static_cast<float*>(rows.out.tensor.data) == out.data<float>() + 2 * 12);
  }
  given[16] = Any(0);
  EXPECT_RAISES("ValueError: tree_mask: expected causal=True beside it, got causal=False",
                AttendCall<Spec>(Inputs(given, 21, 21)));
  given[16] = Any(1), start[2] = 3;
  EXPECT_RAISES("ValueError: query_start_loc: expected num_tokens last, 4, got 3",
                AttendCall<Spec>(Inputs(given, 21, 21)));
  start[2] = 4, table.data<int64_t>()[1] = 9;
  EXPECT_RAISES("IndexError: block_table: expected a block id in [0, 9), got 9 for sequence 0 at position 1",
                AttendCall<Spec>(Inputs(given, 21, 21)));
}

}  // namespace

int main() {
  TestPlans<Spec>(true);
  TestPlans<Spec>(false);
  TestPlans<Windowed>(true);
  TestPlans<Union>(true);
  TestPlans<NoKeys>(true);
  TestShares();
  TestWork();
  TestSplits();
  TestWindows();
  TestTrees();
  TestCall();
  return failures;
}
