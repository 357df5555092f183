"""The inference server: HTTP, command line and the engine behind them."""
