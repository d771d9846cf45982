// Tests of cpu/shared_plan.h, and of what prefixes change in cpu/plan.h and shared/queries.h.

#include <map>
#include <utility>
#include <vector>

#include "cpu/shared_plan.h"
#include "expect.h"

using namespace pa;

namespace {

using Spec = SpecOf<3, false>;  // blocks of 4 tokens, in ranges of 3 blocks
using Windowed = SpecOf<3, false, 9>;

constexpr int32_t kLens[] = {9, 10, 30, 11, 40, 5},
                  kStarts[] = {0, 1, 2, 5, 6, 6, 7};  // query tokens: 1, 1, 3, 1, 0, 1
constexpr int32_t kPrefixLens[] = {8, 4, 0}, kGroups[] = {0, 3, 5, 6};
constexpr Queries kGiven = {kLens, kStarts, 6, true, nullptr};

void TestSeen() {
  const Seen<Spec> seen(30, 8);
  EXPECT(seen.keys.begin == 8 && seen.keys.end == 30 && seen.blocks[0].begin == 2 && seen.blocks[0].end == 8);
  EXPECT(Seen<Windowed>(30, 8).keys.begin == 21 && Seen<Windowed>(30, 24).keys.begin == 24);
  EXPECT(Seen<Union>(100, 40).count == 2);  // what it sees of the first keys is a prefix's
  const SharedQueries queries(kGiven, kPrefixLens, kGroups, 3);
  EXPECT(queries.own.FirstKey(2) == 8 && queries.own.FirstKey(4) == 4 && queries.own.FirstKey(5) == 0);
  EXPECT(queries.of_prefixes.Count(0) == 5 && queries.of_prefixes.Count(1) == 1 && queries.of_prefixes.Count(2) == 1);
  EXPECT(queries.of_prefixes.Position(0, 1) == 9 && queries.of_prefixes.Position(0, 4) == 29);
  const Interval all = SeenTogether<Spec>(queries.of_prefixes, 0, 0, 5).keys;
  EXPECT(all.begin == 0 && all.end == 8);
  const Interval some = SeenTogether<Windowed>(queries.of_prefixes, 0, 0, 5).keys;  // the token at position 8 sees most
  EXPECT(some.begin == 0 && some.end == 8);
  EXPECT(SeenTogether<Windowed>(queries.of_prefixes, 0, 2, 3).keys.end == 0);  // those of sequence 2 see none
  EXPECT(SeenTogether<Windowed>(queries.of_prefixes, 0, 1, 1).keys.begin == 1);
  const Interval own = SeenTogether<Spec>(queries.own, 2, 0, 3).keys;
  EXPECT(own.begin == 8 && own.end == 30);
}

// Each query token has its partial results in slots of their own, and each slot is written by one item with each head.
template <typename Spec>
void TestPartials(int64_t threads) {
  const SharedQueries queries(kGiven, kPrefixLens, kGroups, 3);
  const SharedPlan<Spec> plan(queries, threads);
  EXPECT(plan.num_threads >= 1 && plan.num_threads <= threads);
  std::map<std::pair<int64_t, int64_t>, int> written, merged;
  const auto add = [&](const AttendItem& item) {
    for (int64_t i = 0; i < item.num_query && item.partial_start >= 0; ++i) {
      for (int64_t head = 0; head < item.num_kv_heads; ++head) {
        EXPECT((++written[{item.partial_start + i, item.kv_head_begin + head}] == 1));
      }
    }
  };
  for (int64_t i = 0; i < plan.prefixes.num_dealt; ++i) add(plan.PrefixItem(i));
  for (int64_t i = 0; i < plan.own.num_dealt; ++i) {
    const WorkItem* one = plan.own.OfDecode(i);
    if (one == nullptr) {
      add(plan.own.item(i));
      continue;
    }
    EXPECT(one->batch_start != 1 || one->num_seqs == 1);  // the next one has another number of query tokens
    for (int64_t seq = 0; seq < one->num_seqs && one->partial_start >= 0; ++seq) {
      for (int64_t head = 0; head < 2; ++head) EXPECT((++written[{one->partial_start + seq, head}] == 1));
    }
  }
  Threads alone = {1, kOwn, nullptr};
  std::vector<int64_t> tokens;
  plan.ForTokens(alone, [&](int64_t token, const TokenPartials& of) {
    tokens.push_back(token);
    for (const Slots& slots : {of.shared, of.own}) {
      for (int64_t i = 0; i < slots.count; ++i) {
        EXPECT(slots.start + i * slots.step < plan.num_partials);
        for (int64_t head = 0; head < 2; ++head) EXPECT((++merged[{slots.start + i * slots.step, head}] == 1));
      }
    }
    EXPECT(of.shared.count > 0 && of.own.count > 0);
  });
  EXPECT((tokens == std::vector<int64_t>{0, 1, 2, 3, 4, 5}));  // the last one has no prefix, and is written by its item
  EXPECT(written == merged);
}

}  // namespace

int main() {
  TestSeen();
  for (const int64_t threads : {1, 2, 64}) {
    TestPartials<Spec>(threads);
    TestPartials<Windowed>(threads);
  }
  return failures;
}
