#!/usr/bin/env bash
# The whole story in minutes on two CPU cores, nothing downloaded but Python packages:
# handwritten digits -> EDM teacher -> consistency distillation (CD) -> one- and two-step samples -> numbers,
# and consistency training (CT) without a teacher; then zero-shot editing of digits that no model has seen.
#
#   bash scripts/quickstart.sh [--size 8|16] [--colour] [--smoke] [--out DIR] [--ranks N]
#
# --size: side of the images [pixels], default 16, where the network sees patches of 2 x 2. --colour: digits in coloured
# ink, 8 pixels, without CT, and colourisation among the edits. --smoke: a run of about a minute that only shows that all
# parts work. Everything goes to --out (default runs/quickstart-SIZE); a second run goes on where the first one stopped.
set -eu -o pipefail
cd "$(dirname "$0")/.."
size="" colour="" smoke="" out="" ranks=2 images=1000
while [ $# -gt 0 ]; do
  case $1 in
    --size) size=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --ranks) ranks=$2; shift 2 ;;
    --colour) colour=1; shift ;;
    --smoke) smoke=1 images=200; shift ;;
    *) echo "error: unknown argument $1; see the head of $0" >&2; exit 2 ;;
  esac
done
if [ -z "$size" ]; then size=16; [ -z "$colour" ] || size=8; fi
case $size in 8) p=digits ;; 16) p=digits16 ;; *) echo "error: --size must be 8 or 16, got $size" >&2; exit 2 ;; esac
digits=digits methods="cd ct"
if [ -n "$colour" ]; then
  [ "$size" = 8 ] || { echo "error: --colour goes with --size 8" >&2; exit 2; }
  digits=digits_rgb p=digits_rgb methods=cd
fi
out=${out:-runs/quickstart-$size${colour:+-colour}${smoke:+-smoke}}
. scripts/setup_env.sh mpi quickstart plots
# One thread per process: two ranks fill two cores, and threads that wait for each other cost more than they bring.
export OMP_NUM_THREADS=1

started=$SECONDS
say() { printf '\n[%3d s] %s\n' $((SECONDS - started)) "$*"; }
# The progress of training: one line that changes on a terminal, else every fifth. (Some awks read pipes in blocks.)
progress() {
  local n=0 line
  while IFS= read -r line; do
    case $line in "step "*) n=$((n + 1)) ;; *) continue ;; esac
    if [ -t 1 ]; then
      printf '\r    %s\033[K' "$line"
    elif [ $((n % 5)) = 0 ]; then
      printf '    %s\n' "$line"
    fi
  done
  if [ -t 1 ] && [ "$n" -gt 0 ]; then echo; fi
}
# Prints the command as one would type it, then runs it; its full output goes to a log.
run() {
  echo "  \$ $*"
  "$@" 2>&1 | tee -a "$out/quickstart.log" | progress || { tail -n 20 "$out/quickstart.log" >&2; exit 1; }
}
# What is no job of several ranks goes beside the next command, until `joined`.
beside() { "$@" & other=$!; }
joined() { wait "$other"; }
on_ranks() { run mpiexec -n "$ranks" python "$@"; }
short() { if [ -n "$smoke" ]; then echo "--total_training_steps $1 --preview_interval 10"; else echo "--preview_interval 100"; fi; }
samples() {
  on_ranks scripts/image_sample.py --out_dir "$out/samples/$1" --overwrite True "${@:2}" \
    --classes 0,1,2,3,4,5,6,7,8,9 --num_samples $images
}
edit() {
  on_ranks scripts/image_edit.py "$1" --preset ${p}_cd --model_path "$out/cd" --input "$out/test" --num_results 4 \
    --out_dir "$out/edits/$1" --overwrite True "${@:2}"
}
mkdir -p "$out"
: >"$out/quickstart.log"

say "handwritten digits, bundled with scikit-learn: 1500 to train on, 297 to edit"
beside run python scripts/prepare_data.py $digits "$out/data" --image_size "$size" --split train --overwrite True
run python scripts/prepare_data.py $digits "$out/test" --image_size "$size" --split test --overwrite True ${smoke:+--limit 40}
joined
run python -m evaluations.small_classifier "$out/data" "$out/classifier.pt" ${smoke:+--epochs 3}
say "EDM teacher"
on_ranks scripts/edm_train.py --preset ${p}_edm --data_dir "$out/data" --out_dir "$out/edm" $(short 30)
say "consistency distillation of the teacher"
on_ranks scripts/cm_train.py --preset ${p}_cd --data_dir "$out/data" --teacher_model_path "$out/edm" --out_dir "$out/cd" $(short 20)
if [ -z "$colour" ]; then
  say "consistency training in isolation"
  on_ranks scripts/cm_train.py --preset ${p}_ct --data_dir "$out/data" --out_dir "$out/ct" $(short 20)
fi
say "samples: the teacher with 18 and 2 Heun steps, consistency models with one and two"
samples edm_heun18 --preset ${p}_edm --model_path "$out/edm"
samples edm_heun2 --preset ${p}_edm --model_path "$out/edm" --steps 2
for method in $methods; do
  samples ${method}_onestep --preset ${p}_$method --model_path "$out/$method"
done
say "ternary search of the second time point, then two steps"
for method in $methods; do
  on_ranks scripts/ternary_search.py --preset ${p}_$method --model_path "$out/$method" --ref_batch "$out/data" \
    --features "classifier=$out/classifier.pt" --out_dir "$out/search_$method" --num_samples $images
  ts=$(python -c 'import json, sys; print(*json.load(open(sys.argv[1]))["ts"], sep=",")' "$out/search_$method/search_result.json")
  samples ${method}_twostep --preset ${p}_$method --model_path "$out/$method" --sampler multistep --ts "$ts"
done
say "the distilled model ${colour:+colours, }completes and enlarges digits that it has not seen"
edit inpaint
edit superres --factor 4
if [ -n "$colour" ]; then edit colorize; fi
say "numbers and pictures"
runs=("$out/edm")
for method in $methods; do runs+=("$out/$method"); done
beside run python -m evaluations.reports.digits_report "$out"
run python -m evaluations.reports.edit_report "$out"/edits/* --out "$out/editing.md"
joined
beside run python -m evaluations.reports.edit_page "$out/cd" "$out/test" "$out/editing.png"
run python -m evaluations.reports.run_report.command "${runs[@]}" --out "$out/report.html"
joined
cat "$out/report.md" "$out/editing.md"
say "done; everything is in $out. Open $out/report.html in a browser: curves, previews over time, samples, numbers"
echo "        pictures: $out/{report,editing}.png, $out/search_cd/search.png"
