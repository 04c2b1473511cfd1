// Elements in memory and floats in registers: what the Metal sources beside this file share. _library.py puts it into
// them. Pointers have to be multiples of four elements where four or eight are loaded or stored at once.

// Four neighbours as memory has them, and eight of them in as few loads and stores as there can be.
template <typename Scalar>
struct Four;
template <>
struct Four<float> {
  typedef float4 Stored;
  static void load(device const float* from, thread Stored& low, thread Stored& high) {
    low = *(device const Stored*)from;
    high = *(device const Stored*)(from + 4);
  }
  static void store(device float* to, Stored low, Stored high) {
    *(device Stored*)to = low;
    *(device Stored*)(to + 4) = high;
  }
};
template <>
struct Four<half> {
  typedef half4 Stored;
  static void load(device const half* from, thread Stored& low, thread Stored& high) {
    const uint4 bits = *(device const uint4*)from;
    low = as_type<Stored>(uint2(bits.x, bits.y));
    high = as_type<Stored>(uint2(bits.z, bits.w));
  }
  static void store(device half* to, Stored low, Stored high) {
    const uint2 first = as_type<uint2>(low), second = as_type<uint2>(high);
    *(device uint4*)to = uint4(first.x, first.y, second.x, second.y);
  }
};
template <>
struct Four<bfloat> {
  typedef bfloat4 Stored;
  static void load(device const bfloat* from, thread Stored& low, thread Stored& high) {
    const uint4 bits = *(device const uint4*)from;
    low = as_type<Stored>(uint2(bits.x, bits.y));
    high = as_type<Stored>(uint2(bits.z, bits.w));
  }
  static void store(device bfloat* to, Stored low, Stored high) {
    const uint2 first = as_type<uint2>(low), second = as_type<uint2>(high);
    *(device uint4*)to = uint4(first.x, first.y, second.x, second.y);
  }
};

template <typename Stored>
inline void widen(Stored value, thread float* to) {
  to[0] = float(value.x);
  to[1] = float(value.y);
  to[2] = float(value.z);
  to[3] = float(value.w);
}
template <typename Scalar>
inline typename Four<Scalar>::Stored narrow(thread const float* from) {
  typename Four<Scalar>::Stored value;
  value.x = Scalar(from[0]);
  value.y = Scalar(from[1]);
  value.z = Scalar(from[2]);
  value.w = Scalar(from[3]);
  return value;
}

template <int WIDTH, typename Scalar>
inline void load(device const Scalar* from, thread float* to) {
  typedef typename Four<Scalar>::Stored Stored;
  if (WIDTH == 1) {
    to[0] = float(from[0]);
  } else if (WIDTH == 4) {
    const Stored value = *(device const Stored*)from;
    widen(value, to);
  } else {
    Stored low, high;
    Four<Scalar>::load(from, low, high);
    widen(low, to);
    widen(high, to + WIDTH - 4);
  }
}
template <int WIDTH, typename Scalar>
inline void store(device Scalar* to, thread const float* from) {
  typedef typename Four<Scalar>::Stored Stored;
  if (WIDTH == 1) {
    to[0] = Scalar(from[0]);
  } else if (WIDTH == 4) {
    *(device Stored*)to = narrow<Scalar>(from);
  } else {
    Four<Scalar>::store(to, narrow<Scalar>(from), narrow<Scalar>(from + WIDTH - 4));
  }
}

// By the bits in memory: what a value is, the compiler may think that it knows.
inline bool is_finite(device const float* value) {
  return (*(device const uint*)value & 0x7f800000u) != 0x7f800000u;
}
inline bool is_finite(device const half* value) {
  return (*(device const ushort*)value & 0x7c00u) != 0x7c00u;
}
inline bool is_finite(device const bfloat* value) {
  return (*(device const ushort*)value & 0x7f80u) != 0x7f80u;
}

// Whether it is plus infinity, by the bits too.
inline bool is_infinity(device const float* value) {
  return *(device const uint*)value == 0x7f800000u;
}
inline bool is_infinity(device const half* value) {
  return *(device const ushort*)value == 0x7c00u;
}
inline bool is_infinity(device const bfloat* value) {
  return *(device const ushort*)value == 0x7f80u;
}
