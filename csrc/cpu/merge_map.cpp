// Numbering the output of a merge on the CPU: integers only, so once for all instruction sets.
#include "cpu/merge_map.h"

#include <algorithm>
#include <functional>
#include <vector>

namespace tokencomp::cpu {
namespace {

using namespace merge;

class ItemMap {
 public:
  ItemMap(const MapArgs& args, int item) : m(args), b(item), map(args.map + int64_t(item) * args.N) {}

  void make() {
    rank();
    std::fill(map, map + m.N, kUnlisted);
    for (int i = 0; i < m.Ra; ++i) mark(m.a_token(b, i), kListed);
    for (int j = 0; j < m.Rb; ++j) mark(m.b_token(b, j), kListed);
    for (int j = 0; j < m.Rr; ++j) mark(m.rest_token(b, j), kListed);
    for (int k = 0; k < m.r; ++k) mark(m.a_token(b, row(k)), kGone);
    number_survivors();
    for (int k = 0; k < m.r; ++k) move(row(k));
  }

 private:
  // ranked[0, r) are the rows that move; where the output order asks for it the others are sorted too.
  void rank() {
    ranked.resize(m.Ra);
    for (int i = 0; i < m.Ra; ++i) ranked[i] = m.rank_key(b, i);
    if (m.order == Order::similarity) {
      std::sort(ranked.begin(), ranked.end(), std::greater<>());
    } else if (m.r > 0 && m.r < m.Ra) {
      std::nth_element(ranked.begin(), ranked.begin() + m.r, ranked.end(), std::greater<>());
    }
  }
  int row(int k) const { return MapArgs::row_of(ranked[k]); }

  void mark(int token, int state) {
    if (m.is_token(token)) map[token] = state;
  }

  void number_survivors() {
    for (int t = 0; t < m.prefix; ++t) number(t);
    for (int t = m.prefix; t < m.N; ++t) {
      if (m.order == Order::position || map[t] == kUnlisted) number(t);
    }
    if (m.order == Order::position) return;
    for (int j = 0; j < m.Rr; ++j) number(m.rest_token(b, j));
    if (m.order == Order::similarity) {
      for (int k = m.r; k < m.Ra; ++k) number(m.a_token(b, row(k)));
    } else {
      for (int i = 0; i < m.Ra; ++i) number(m.a_token(b, i));
    }
    for (int j = 0; j < m.Rb; ++j) number(m.b_token(b, j));
  }

  void number(int token) {
    if (m.is_token(token) && map[token] < 0 && map[token] != kGone) map[token] = next++;
  }

  void move(int i) {
    const int token = m.a_token(b, i), column = m.index[int64_t(b) * m.Ra + i];
    if (!m.is_token(token)) return;
    const int target = column >= 0 && column < m.Rb ? m.b_token(b, column) : -1;
    map[token] = m.is_token(target) && map[target] >= 0 ? map[target] : -1;
  }

  const MapArgs& m;
  const int b;
  int* map;
  int next = 0;
  std::vector<OrderKey> ranked;
};

}  // namespace

void map_item(const MapArgs& args, int b) { ItemMap(args, b).make(); }

}  // namespace tokencomp::cpu
