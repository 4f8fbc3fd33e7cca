"""The monitor: measurements of all processes in, Prometheus text out."""
