"""The growth engine for CPUs in C++: one host after the other, each in a core's cache, compiled at first use."""
