#!/usr/bin/env bash
# The whole story in minutes on two CPU cores, nothing downloaded but Python packages:
# handwritten digits -> EDM teacher -> consistency distillation (CD) -> one- and two-step samples -> numbers,
# and consistency training (CT) without a teacher.
#
#   bash scripts/quickstart.sh [--size 8|16] [--smoke] [--out DIR] [--ranks N]
#
# --size 16: nicer pictures, about three times the time. --smoke: a run of about a minute that only shows that all
# parts work. Everything goes to --out (default runs/quickstart); a second run goes on where the first one stopped.
set -eu -o pipefail
cd "$(dirname "$0")/.."
size=8 smoke="" out="" ranks=2 images=1000
while [ $# -gt 0 ]; do
  case $1 in
    --size) size=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --ranks) ranks=$2; shift 2 ;;
    --smoke) smoke=1 images=200; shift ;;
    *) echo "error: unknown argument $1; see the head of $0" >&2; exit 2 ;;
  esac
done
case $size in 8) p=digits ;; 16) p=digits16 ;; *) echo "error: --size must be 8 or 16, got $size" >&2; exit 2 ;; esac
out=${out:-runs/quickstart${size#8}${smoke:+-smoke}}
. scripts/setup_env.sh mpi quickstart
# One thread per process: two ranks fill two cores, and threads that wait for each other cost more than they bring.
export OMP_NUM_THREADS=1

started=$SECONDS
say() { printf '\n[%3d s] %s\n' $((SECONDS - started)) "$*"; }
# Prints the command as one would type it, then runs it; its full output goes to a log.
run() { echo "  \$ $*"; "$@" >>"$out/quickstart.log" 2>&1 || { tail -n 20 "$out/quickstart.log" >&2; exit 1; }; }
on_ranks() { run mpiexec -n "$ranks" python "$@"; }
short() { if [ -n "$smoke" ]; then echo "--total_training_steps $1"; fi; }
samples() {
  on_ranks scripts/image_sample.py --out_dir "$out/samples/$1" --overwrite True "${@:2}" \
    --classes 0,1,2,3,4,5,6,7,8,9 --num_samples $images
}
mkdir -p "$out"
: >"$out/quickstart.log"

say "handwritten digits, bundled with scikit-learn"
run python scripts/prepare_data.py digits "$out/data" --image_size "$size" --overwrite True
run python -m evaluations.digits_classifier "$out/data" "$out/classifier.pt"
say "EDM teacher"
on_ranks scripts/edm_train.py --preset ${p}_edm --data_dir "$out/data" --out_dir "$out/edm" $(short 60)
say "consistency distillation of the teacher"
on_ranks scripts/cm_train.py --preset ${p}_cd --data_dir "$out/data" --teacher_model_path "$out/edm" --out_dir "$out/cd" $(short 30)
say "consistency training in isolation"
on_ranks scripts/cm_train.py --preset ${p}_ct --data_dir "$out/data" --out_dir "$out/ct" $(short 30)
say "samples: the teacher with 18 and 2 Heun steps, CD and CT with one and two"
samples edm_heun18 --preset ${p}_edm --model_path "$out/edm"
samples edm_heun2 --preset ${p}_edm --model_path "$out/edm" --steps 2
for method in cd ct; do
  samples ${method}_onestep --preset ${p}_$method --model_path "$out/$method"
done
say "ternary search of the second time point, then two steps"
for method in cd ct; do
  on_ranks scripts/ternary_search.py --preset ${p}_$method --model_path "$out/$method" --ref_batch "$out/data" \
    --features "digits=$out/classifier.pt" --out_dir "$out/search_$method" --num_samples $images
  ts=$(python -c 'import json, sys; print(*json.load(open(sys.argv[1]))["ts"], sep=",")' "$out/search_$method/search_result.json")
  samples ${method}_twostep --preset ${p}_$method --model_path "$out/$method" --sampler multistep --ts "$ts"
done
say "numbers and pictures"
run python -m evaluations.digits_report "$out"
cat "$out/report.md"
say "done; everything is in $out. Pictures: $out/report.png, $out/search_cd/search.png, $out/*/previews"
