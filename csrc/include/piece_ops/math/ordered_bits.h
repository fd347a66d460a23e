// ordered_bits.h - maps a score to an unsigned key whose integer order is the selection's order.
//
//   NaN -> 0   <   -inf  <  ...  <  -0 == +0  <  ...  <  +inf
//
// A positive float already orders like its bits; a negative one orders like its inverted bits.
// Keys 1 .. 0x007ffffe (negative NaN patterns), 0x7fffffff (-0) and those above +inf never occur.
#pragma once

#include <cstdint>
#include <cstring>

#include "piece_ops/math/hd.h"

namespace piece_ops {

template <class To, class From>
PIECE_OPS_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
struct KeyType;
template <>
struct KeyType<float> {
  using type = uint32_t;
  static constexpr type kSign = 0x80000000u;
  static constexpr type kInfinity = 0x7f800000u;
};
template <>
struct KeyType<double> {
  using type = uint64_t;
  static constexpr type kSign = 0x8000000000000000u;
  static constexpr type kInfinity = 0x7ff0000000000000u;
};
template <class T>
using Key = typename KeyType<T>::type;

template <class T>
PIECE_OPS_HD Key<T> to_key(T x) {
  using K = Key<T>;
  constexpr K sign = KeyType<T>::kSign;
  K bits = bit_cast<K>(x);
  const K magnitude = bits & ~sign;
  if (magnitude == 0) bits = 0;
  const K key = bits ^ ((bits & sign) ? ~K{0} : sign);
  return magnitude > KeyType<T>::kInfinity ? K{0} : key;
}

// The value whose key this is; for a key that never occurs (see above) some NaN or -0.
template <class T>
PIECE_OPS_HD T from_key(Key<T> key) {
  constexpr Key<T> sign = KeyType<T>::kSign;
  return bit_cast<T>(key ^ ((key & sign) ? sign : ~Key<T>{0}));
}

}  // namespace piece_ops
