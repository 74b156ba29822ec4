"""What the scripts of `examples/` share. Install it beside the package: `pip install . ./examples`."""
