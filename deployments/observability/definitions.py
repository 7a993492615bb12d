"""Every metric of `GET /metrics`: docs/reference/metrics.md is made of this (`make docs`)."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Definition(NamedTuple):
    """`name` without a counter's `_total`. `source`: the key in what a replica, or the artifact store, tells."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    source: str = ""

    @property
    def exposed(self) -> str:
        """As Prometheus has it."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


MODEL = ("model_name", "router")

# Each sample has the label `router`, since each router has counters of its own.
ROUTER_METRICS = (
    Definition("nibble_build_info", "gauge", ("version", "router"), "nibble's version; always 1."),
    Definition("nibble_requests", "counter", ("api", "method", "status", "router"),
               "Answered requests by API (http, grpc), route or gRPC method, and status; probes and scrapes are left "
               "out, and 499 or CANCELLED is a client that left."),
    Definition("nibble_refused", "counter", ("model_name", "reason", "router"),
               "Requests that were refused or ended in an error, by the error's code; model_name is empty where none "
               "is known."),
    Definition("nibble_admission_refusals", "counter", ("model_name", "reason", "router"),
               "Completions that the model's queue refused: it was full of requests or of tokens, they could not start "
               "by their deadline, or were displaced by another key's."),
    Definition("nibble_model_ready", "gauge", MODEL, "1 where the model takes requests, else 0."),
    Definition("nibble_model_info", "gauge", ("model_name", "family", "engine", "quantization", "router"),
               "What a served model is; always 1."),
    Definition("vllm:num_requests_running", "gauge", MODEL, "Requests in flight whose first token has come."),
    Definition("vllm:num_requests_waiting", "gauge", MODEL,
               "Requests in flight that wait for their first token: in a queue, or in prefill."),
    Definition("vllm:prompt_tokens", "counter", MODEL, "Prompt tokens of all requests."),
    Definition("vllm:generation_tokens", "counter", MODEL, "Generated tokens that came to the router."),
    Definition("vllm:prefix_cache_queries", "counter", MODEL,
               "Prompt tokens of the completions whose replica told how many it had cached."),
    Definition("vllm:prefix_cache_hits", "counter", MODEL, "Of these, those that were in the replica's KV cache."),
    Definition("vllm:request_success", "counter", ("model_name", "finished_reason", "router"),
               "Completions that ended, by reason: stop, length, abort (the client left)."),
    Definition("vllm:time_to_first_token_seconds", "histogram", MODEL,
               "Seconds from a request's arrival to its first token."),
    Definition("nibble_serving_time_to_first_token_seconds", "histogram", MODEL,
               "Of these, what was not the engine's: the wait for a replica, Serve, the prompt's tokens."),
    Definition("vllm:request_queue_time_seconds", "histogram", MODEL,
               "Seconds that a completion waited in its engine."),
    Definition("vllm:request_prefill_time_seconds", "histogram", MODEL,
               "Seconds from then to its first token, in the engine."),
    Definition("vllm:inter_token_latency_seconds", "histogram", MODEL,
               "Seconds from one chunk with tokens of a completion to the next one."),
    Definition("vllm:e2e_request_latency_seconds", "histogram", MODEL,
               "Seconds from arrival to end, of the requests whose completions all ended."),
)  # fmt: skip

REPLICA = ("model_name", "replica")

REPLICA_INFO = Definition(
    "nibble_replica_info", "gauge", (*REPLICA, "engine", "isa", "precision", "products", "threads", "cores"),
    "What a running replica is, where it answers; always 1.",
)  # fmt: skip
# `source` is a key of `Engine.info`.
REPLICA_METRICS = (
    Definition("nibble_replica_running_sequences", "gauge", REPLICA, "Sequences that the engine computes.", "running"),
    Definition("nibble_replica_waiting_sequences", "gauge", REPLICA, "Sequences that wait in the engine.", "waiting"),
    Definition("vllm:kv_cache_usage_perc", "gauge", REPLICA,
               "Part of the KV cache's blocks that sequences hold, from 0 to 1.", "kv_cache_usage"),
    Definition("nibble_replica_kv_cache_tokens", "gauge", REPLICA, "Tokens that the KV cache has room for.",
               "kv_cache_tokens"),
    Definition("nibble_replica_mapped_bytes", "gauge", REPLICA,
               "Bytes of weights that are mapped, and shared by the replicas of a node.", "mapped_bytes"),
    Definition("nibble_replica_requests", "counter", REPLICA, "Requests that the engine took up.", "requests"),
    Definition("nibble_replica_cancelled", "counter", REPLICA, "Of these, those that ended before their end.",
               "cancelled"),
    Definition("nibble_replica_prompt_tokens", "counter", REPLICA, "Prompt tokens, cached ones included.",
               "prompt_tokens"),
    Definition("nibble_replica_cached_tokens", "counter", REPLICA, "Of these, those from the KV cache.",
               "reused_tokens"),
    Definition("nibble_replica_scored_tokens", "counter", REPLICA,
               "Tokens of prompts whose log probabilities were asked for.", "scored_tokens"),
    Definition("nibble_replica_generated_tokens", "counter", REPLICA, "Generated tokens.", "generated_tokens"),
    Definition("nibble_replica_first_token_seconds", "counter", REPLICA,
               "Seconds from a request's arrival in the engine to its first token, of all together.", "first_token_s"),
    Definition("nibble_replica_steps", "counter", REPLICA, "Runs of the model's graph.", "steps"),
    Definition("nibble_replica_step_seconds", "counter", REPLICA, "Seconds that they took together.", "step_s"),
    Definition("vllm:spec_decode_num_draft_tokens", "counter", REPLICA, "Draft tokens.", "guessed_tokens"),
    Definition("vllm:spec_decode_num_accepted_tokens", "counter", REPLICA, "Draft tokens that were right.",
               "accepted_tokens"),
)  # fmt: skip

# Of the artifact store, one in the cluster. `source` is a field of its counters.
STORE_METRICS = (
    Definition("nibble_artifact_fetches", "counter", ("source",),
               "Artifacts that replicas took at their start, by where from: their node's cache (node_cache), or the "
               "object store (object_store).", "fetches"),
    Definition("nibble_artifact_reads", "counter", ("source",),
               "Artifacts that were read into the object store: from a node's cache (node_cache) or the durable copy "
               "(durable).", "reads"),
    Definition("nibble_conversions", "counter", ("result",), "Conversions that ended, by result: done, failed.",
               "conversions"),
    Definition("nibble_conversion_bytes", "counter", (), "Bytes of the artifacts that conversions made.",
               "conversion_bytes"),
    Definition("nibble_conversion_seconds", "counter", (), "Seconds that these took, checks included.",
               "conversion_s"),
)  # fmt: skip
