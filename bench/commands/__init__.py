"""What `python -m bench` can be asked for, one file each: `main(argv) -> exit code`."""
