#!/usr/bin/env bash
# Two presets, on all GPUs of this machine, or on one CPU process where there is none.
#     ./run.sh quick          50 training steps, 20 of evaluation
#     ./run.sh production     gpt2 on WikiText-2, three epochs, a checkpoint every 500 steps; started again, it goes on
set -euo pipefail
cd "$(dirname "$0")"

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
launch=(python)
if [ "$gpus" -gt 1 ]; then
    launch=(torchrun --standalone --nproc-per-node "$gpus")
fi

case "${1:-}" in
quick)
    exec "${launch[@]}" main.py --max_train_steps 50 --max_eval_steps 20 \
        --generation_prompt "Return a" --output_dir output/quick "${@:2}"
    ;;
production)
    # gpt2 fits on a GPU of 16 GB by itself. For what does not: --deepspeed_config config/deepspeed/zero-2.json
    exec "${launch[@]}" main.py --model_name gpt2 --dataset_name wikitext --dataset_config wikitext-2-raw-v1 \
        --max_length 512 --batch_size 4 --num_epochs 3 --learning_rate 5e-5 \
        --save_checkpoint 500 --resume --generation_prompt "The history of" --output_dir output/production "${@:2}"
    ;;
*)
    echo "usage: ./run.sh quick|production [more options of main.py]" >&2
    exit 2
    ;;
esac
