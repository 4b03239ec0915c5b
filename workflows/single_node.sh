#!/usr/bin/env bash
# One raster on one machine, from a look at the plan to a map for GIS, and as often as it takes.
#
#     workflows/single_node.sh scene.tif maps/scene.zarr --model my.safetensors
#
# What follows the two paths goes to `tilepipe segment`. Stopping it, or losing the machine, costs the blocks that
# were in hand: run the same line again.
set -uo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 INPUT OUTPUT.zarr [OPTIONS of tilepipe segment]" >&2
  exit 2
fi
input=$1 output=$2
shift 2

# Tiles, memory and what would be read and written, before anything is. Ends here where the job cannot be done.
tilepipe segment "$input" "$output" "$@" --dry-run || exit

# Exit code 1 says that a retry may help (a full disk, a lost worker, a bucket that did not answer): three of them.
# 3 is bad input and 2 a wrong option, which no retry mends; 75 and 130 are SIGTERM and Ctrl-C: someone wants it to end.
for attempt in 1 2 3 4; do
  tilepipe segment "$input" "$output" "$@"
  code=$?
  if [ "$code" -ne 1 ] || [ "$attempt" -eq 4 ]; then
    break
  fi
  sleep "$((attempt * ${PAUSE:-20}))"
done
if [ "$code" -ne 0 ]; then
  exit "$code"
fi

# A Cloud Optimized GeoTIFF beside the store, with colours, class names and overviews, and each class's area.
tilepipe export "$output" "${output%.zarr}.tif" --overwrite
tilepipe stats "$output"
