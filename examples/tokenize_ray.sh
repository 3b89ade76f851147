#!/bin/bash
# Tokenize a corpus on several machines with Ray, without Kubernetes:
#
#     NODES="node1 node2" examples/tokenize_ray.sh CORPUS OUT [option of nemo-lfr tokenize ...]
#
# Run the script on the first machine. It starts Ray there and, over SSH, on the NODES. Then it tokenizes the corpus and
# stops Ray. All machines need access to CORPUS and OUT under the same paths, and the same Python environment with the
# `ray` extra.
#
# Recent releases of Ray require a token. Run `ray get-auth-token --generate` once and copy ~/.ray/auth_token to all
# machines. In a network that you trust, you can set RAY_AUTH_MODE=disabled instead, here and in SETUP.
#
# Environment variables:
#     NODES    names of the other machines
#     HEAD     address under which the others reach the first machine (default: the first of `hostname -I`)
#     PORT     port of Ray (default 6379)
#     SETUP    command that activates the environment on the other machines (default: none)
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: NODES=\"node1 node2\" tokenize_ray.sh CORPUS OUT [option ...]" >&2
  exit 2
fi
corpus=$1 out=$2
shift 2
head=${HEAD:-$(hostname -I | cut -d' ' -f1)}
port=${PORT:-6379}
read -ra nodes <<<"${NODES:-}"
export RAY_USAGE_STATS_ENABLED=0

# With --block, Ray stops when this script ends the `ray start` process. `ray stop` would also stop the Ray processes of
# other users.
processes=()
trap 'kill "${processes[@]}" 2>/dev/null || true; wait' EXIT
ray start --head --node-ip-address="$head" --port="$port" --include-dashboard=false --block >/dev/null &
processes+=($!)
for node in "${nodes[@]}"; do  # -tt: ending ssh also ends the remote process
  ssh -tt "$node" "${SETUP:-true} && ray start --address=$head:$port --block" </dev/null >/dev/null &
  processes+=($!)
done

python - "$head:$port" $((1 + ${#nodes[@]})) <<'PYTHON'
import sys, time
import ray

deadline = time.monotonic() + 300
while not ray.is_initialized():
    try:
        ray.init(sys.argv[1], logging_level="error", log_to_driver=False)
    except Exception as error:
        if time.monotonic() > deadline:
            sys.exit(f"tokenize_ray.sh: Ray does not start at {sys.argv[1]} ({error})")
        time.sleep(1)
while (count := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[2]):
    if time.monotonic() > deadline:
        sys.exit(f"tokenize_ray.sh: only {count} of {sys.argv[2]} machines joined the cluster")
    time.sleep(1)
PYTHON
nemo-lfr tokenize "$corpus" --out "$out" --ray "$head:$port" "$@"
