"""How a batch is stepped: eagerly, compiled, in slabs (docs/algorithm.md, section 8)."""
