"""What scripts/compare is made of; see there and docs/benchmarks.md."""
