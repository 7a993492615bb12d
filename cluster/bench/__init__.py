"""`nibble bench`: load for any OpenAI-compatible server, and for nibble over gRPC.

records   what goes from one station to the next: settings, loads, requests, runs
prompts   unique prompts, from a seed
schedule  how many requests, when each is due, which server's turn it is
figures   percentiles, medians over rounds, ratios: pure functions of runs
http1     HTTP/1.1 as bytes with the times of their arrival
clients   one request over HTTP; grpc_client: the same over gRPC
runner    warm-up, closed and open loops, rounds
report    tables and JSON; plot: a figure by matplotlib
"""
