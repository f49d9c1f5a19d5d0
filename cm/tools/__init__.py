"""What nothing else needs: benchmarks, planning, conversion, the doctor."""
