"""`torchrun ... -m megatron_dr.train`: Megatron's own training loop with the plugin."""

from megatron_dr.mcore.loop.train import main

if __name__ == "__main__":
    main()
