"""What `bench/serve.py` is made of: a client, servers to try, and the rows."""
