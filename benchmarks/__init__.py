"""Benchmarks: what one way of doing the same work costs against another, in one run on one machine."""
