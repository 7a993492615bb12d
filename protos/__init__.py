"""The wire contract. `inference_pb2*` are generated from inference.proto: `make protos` writes, CI checks them."""
