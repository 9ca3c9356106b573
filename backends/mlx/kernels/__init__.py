"""Fused kernels, `<where>_<op>`; the plain form of each, which it must equal, is in `ops/`."""
