#!/bin/bash
# Calibrate once, pack in TASKS jobs, assemble: MODEL WORK OUT [TASKS] [LAYERS]
set -euo pipefail

if (($# < 3)); then
    echo "usage: $0 MODEL WORK OUT [TASKS [LAYERS]]" >&2
    exit 2
fi
export MODEL=$1 WORK=$2 OUT=$3 LAYERS=${5:-62}
tasks=${4:-8}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$WORK/parts"

calibrate=$(sbatch --parsable --export=ALL "$here/calibrate.sbatch")
pack=$(sbatch --parsable --export=ALL --array="0-$((tasks - 1))" --dependency="afterok:$calibrate" "$here/pack.sbatch")
assemble=$(sbatch --parsable --export=ALL --dependency="afterok:$pack" "$here/assemble.sbatch")
echo "jobs: calibrate $calibrate, pack $pack, assemble $assemble; the result will be $OUT"
