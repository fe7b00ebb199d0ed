"""OpenAI's interface over the engine, a playground, metrics: `dmax serve`."""
