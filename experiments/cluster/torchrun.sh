#!/usr/bin/env bash
# One run on several nodes by torchrun: start this on each of them, with the same overrides.
#   NODES=2 NODE_RANK=0 MASTER_ADDR=first.node experiments/cluster/torchrun.sh trainer=fsdp lora.r=64
# The run's folder must lie on a file system that all nodes see. DEVICES: processes of a node.
set -euo pipefail
exec python -m torch.distributed.run \
  --nnodes="$NODES" --node-rank="$NODE_RANK" --nproc-per-node="${DEVICES:=8}" \
  --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
  -m neo.train trainer.num_nodes="$NODES" trainer.devices="$DEVICES" "$@"
