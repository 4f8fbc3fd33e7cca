"""`python -m libllm.cli`."""

from libllm.cli import main

if __name__ == "__main__":
    main()
