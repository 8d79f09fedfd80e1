"""What the method costs in time and memory. Each benchmark first checks that what it compares gives equal results."""
