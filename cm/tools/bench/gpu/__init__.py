"""One report of everything that only a GPU can show: `scripts/gpu_report.sh`."""
