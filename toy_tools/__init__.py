"""Everything around rest.py: executable toy tools and tasks, the embedded policy, loaders, benchmarks."""
