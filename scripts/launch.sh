#!/usr/bin/env bash
# Every experiment of "Consistency Models" (Song et al. 2023) on ImageNet and LSUN: a list to copy commands from.
#
# Each published command stands in its long form; the line after it says the same through a preset. Where there is
# only the short form, no command was published. `--dry_run True` prints what a command means. More presets, among
# them those of CIFAR-10: python -m cm.presets
#
# Paths: data/ holds training images (scripts/prepare_data.py), models/ released or own models, references/ the
# statistics for FID. Replace "mpiexec -n 8" by "torchrun --nproc-per-node 8" or "srun" as the cluster wants it, or
# leave it out.
echo "launch.sh is a list of commands: copy the one you want." >&2
exit 2

####################################################################################################
# EDM teachers
####################################################################################################

# EDM teacher, ImageNet 64x64
mpiexec -n 8 python scripts/edm_train.py --attention_resolutions 32,16,8 --class_cond True \
    --use_scale_shift_norm True --dropout 0.1 --ema_rate 0.999,0.9999,0.9999432189950708 \
    --global_batch_size 4096 --image_size 64 --lr 0.0001 --num_channels 192 --num_head_channels 64 \
    --num_res_blocks 3 --resblock_updown True --schedule_sampler lognormal --use_fp16 True --weight_decay 0.0 \
    --weight_schedule karras --data_dir data/imagenet64
mpiexec -n 8 python scripts/edm_train.py --preset imagenet64_edm --data_dir data/imagenet64

# EDM teacher, LSUN Bedroom 256x256
mpiexec -n 8 python scripts/edm_train.py --attention_resolutions 32,16,8 --class_cond False --dropout 0.1 \
    --ema_rate 0.999,0.9999,0.9999432189950708 --global_batch_size 256 --image_size 256 --lr 0.0001 \
    --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True \
    --schedule_sampler lognormal --use_fp16 True --use_scale_shift_norm False --weight_decay 0.0 \
    --weight_schedule karras --data_dir data/bedroom256
mpiexec -n 8 python scripts/edm_train.py --preset bedroom256_edm --data_dir data/bedroom256

# Cat
mpiexec -n 8 python scripts/edm_train.py --preset cat256_edm --data_dir data/cat256

# 50 000 samples of the ImageNet teacher: Heun, 40 steps, 79 network evaluations
mpiexec -n 8 python scripts/image_sample.py --training_mode edm --batch_size 64 --sigma_max 80 --sigma_min 0.002 \
    --s_churn 0 --steps 40 --sampler heun --model_path models/edm_imagenet64_ema.pt \
    --attention_resolutions 32,16,8 --class_cond True --dropout 0.1 --image_size 64 --num_channels 192 \
    --num_head_channels 64 --num_res_blocks 3 --num_samples 50000 --resblock_updown True --use_fp16 True \
    --use_scale_shift_norm True --weight_schedule karras
mpiexec -n 8 python scripts/image_sample.py --preset imagenet64_edm --model_path models/edm_imagenet64_ema.pt

# 50 000 samples of the Bedroom teacher
mpiexec -n 8 python scripts/image_sample.py --training_mode edm --generator determ-indiv --batch_size 8 \
    --sigma_max 80 --sigma_min 0.002 --s_churn 0 --steps 40 --sampler heun \
    --model_path models/edm_bedroom256_ema.pt --attention_resolutions 32,16,8 --class_cond False --dropout 0.1 \
    --image_size 256 --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --num_samples 50000 \
    --resblock_updown True --use_fp16 True --use_scale_shift_norm False --weight_schedule karras
mpiexec -n 8 python scripts/image_sample.py --preset bedroom256_edm --generator determ-indiv \
    --model_path models/edm_bedroom256_ema.pt

# 50 000 samples of the Cat teacher
mpiexec -n 8 python scripts/image_sample.py --preset cat256_edm --model_path models/edm_cat256_ema.pt

####################################################################################################
# Consistency distillation (CD)
####################################################################################################

# ImageNet, l2
mpiexec -n 8 python scripts/cm_train.py --training_mode consistency_distillation --target_ema_mode fixed \
    --start_ema 0.95 --scale_mode fixed --start_scales 40 --total_training_steps 600000 --loss_norm l2 \
    --lr_anneal_steps 0 --teacher_model_path models/edm_imagenet64_ema.pt --attention_resolutions 32,16,8 \
    --class_cond True --use_scale_shift_norm True --dropout 0.0 --teacher_dropout 0.1 \
    --ema_rate 0.999,0.9999,0.9999432189950708 --global_batch_size 2048 --image_size 64 --lr 0.000008 \
    --num_channels 192 --num_head_channels 64 --num_res_blocks 3 --resblock_updown True \
    --schedule_sampler uniform --use_fp16 True --weight_decay 0.0 --weight_schedule uniform \
    --data_dir data/imagenet64
mpiexec -n 8 python scripts/cm_train.py --preset imagenet64_cd_l2 --data_dir data/imagenet64 \
    --teacher_model_path models/edm_imagenet64_ema.pt

# ImageNet, LPIPS
mpiexec -n 8 python scripts/cm_train.py --training_mode consistency_distillation --target_ema_mode fixed \
    --start_ema 0.95 --scale_mode fixed --start_scales 40 --total_training_steps 600000 --loss_norm lpips \
    --lr_anneal_steps 0 --teacher_model_path models/edm_imagenet64_ema.pt --attention_resolutions 32,16,8 \
    --class_cond True --use_scale_shift_norm True --dropout 0.0 --teacher_dropout 0.1 \
    --ema_rate 0.999,0.9999,0.9999432189950708 --global_batch_size 2048 --image_size 64 --lr 0.000008 \
    --num_channels 192 --num_head_channels 64 --num_res_blocks 3 --resblock_updown True \
    --schedule_sampler uniform --use_fp16 True --weight_decay 0.0 --weight_schedule uniform \
    --data_dir data/imagenet64
mpiexec -n 8 python scripts/cm_train.py --preset imagenet64_cd_lpips --data_dir data/imagenet64 \
    --teacher_model_path models/edm_imagenet64_ema.pt

# Bedroom, l2
mpiexec -n 8 python scripts/cm_train.py --training_mode consistency_distillation --sigma_max 80 \
    --sigma_min 0.002 --target_ema_mode fixed --start_ema 0.95 --scale_mode fixed --start_scales 40 \
    --total_training_steps 600000 --loss_norm l2 --lr_anneal_steps 0 \
    --teacher_model_path models/edm_bedroom256_ema.pt --attention_resolutions 32,16,8 --class_cond False \
    --use_scale_shift_norm False --dropout 0.0 --teacher_dropout 0.1 \
    --ema_rate 0.9999,0.99994,0.9999432189950708 --global_batch_size 256 --image_size 256 --lr 0.00001 \
    --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True \
    --schedule_sampler uniform --use_fp16 True --weight_decay 0.0 --weight_schedule uniform \
    --data_dir data/bedroom256
mpiexec -n 8 python scripts/cm_train.py --preset bedroom256_cd_l2 --data_dir data/bedroom256 \
    --teacher_model_path models/edm_bedroom256_ema.pt

# Bedroom, LPIPS
mpiexec -n 8 python scripts/cm_train.py --training_mode consistency_distillation --sigma_max 80 \
    --sigma_min 0.002 --target_ema_mode fixed --start_ema 0.95 --scale_mode fixed --start_scales 40 \
    --total_training_steps 600000 --loss_norm lpips --lr_anneal_steps 0 \
    --teacher_model_path models/edm_bedroom256_ema.pt --attention_resolutions 32,16,8 --class_cond False \
    --use_scale_shift_norm False --dropout 0.0 --teacher_dropout 0.1 \
    --ema_rate 0.9999,0.99994,0.9999432189950708 --global_batch_size 256 --image_size 256 --lr 0.00001 \
    --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True \
    --schedule_sampler uniform --use_fp16 True --weight_decay 0.0 --weight_schedule uniform \
    --data_dir data/bedroom256
mpiexec -n 8 python scripts/cm_train.py --preset bedroom256_cd_lpips --data_dir data/bedroom256 \
    --teacher_model_path models/edm_bedroom256_ema.pt

# Cat, l2
mpiexec -n 8 python scripts/cm_train.py --preset cat256_cd_l2 --data_dir data/cat256 \
    --teacher_model_path models/edm_cat256_ema.pt

# Cat, LPIPS
mpiexec -n 8 python scripts/cm_train.py --preset cat256_cd_lpips --data_dir data/cat256 \
    --teacher_model_path models/edm_cat256_ema.pt

####################################################################################################
# Consistency training (CT)
####################################################################################################
# The published lines pass a teacher, whose weights the model then starts from. `--variant paper` starts from random
# weights, as the paper says, with the learning rate of its Table 3.

# ImageNet
mpiexec -n 8 python scripts/cm_train.py --training_mode consistency_training --target_ema_mode adaptive \
    --start_ema 0.95 --scale_mode progressive --start_scales 2 --end_scales 200 --total_training_steps 800000 \
    --loss_norm lpips --lr_anneal_steps 0 --teacher_model_path models/edm_imagenet64_ema.pt \
    --attention_resolutions 32,16,8 --class_cond True --use_scale_shift_norm True --dropout 0.0 \
    --teacher_dropout 0.1 --ema_rate 0.999,0.9999,0.9999432189950708 --global_batch_size 2048 --image_size 64 \
    --lr 0.0001 --num_channels 192 --num_head_channels 64 --num_res_blocks 3 --resblock_updown True \
    --schedule_sampler uniform --use_fp16 True --weight_decay 0.0 --weight_schedule uniform \
    --data_dir data/imagenet64
mpiexec -n 8 python scripts/cm_train.py --preset imagenet64_ct --data_dir data/imagenet64 \
    --teacher_model_path models/edm_imagenet64_ema.pt

# Bedroom
mpiexec -n 8 python scripts/cm_train.py --training_mode consistency_training --target_ema_mode adaptive \
    --start_ema 0.95 --scale_mode progressive --start_scales 2 --end_scales 150 --total_training_steps 1000000 \
    --loss_norm lpips --lr_anneal_steps 0 --teacher_model_path models/edm_bedroom256_ema.pt \
    --attention_resolutions 32,16,8 --class_cond False --use_scale_shift_norm False --dropout 0.0 \
    --teacher_dropout 0.1 --ema_rate 0.9999,0.99994,0.9999432189950708 --global_batch_size 256 --image_size 256 \
    --lr 0.00005 --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True \
    --schedule_sampler uniform --use_fp16 True --weight_decay 0.0 --weight_schedule uniform \
    --data_dir data/bedroom256
mpiexec -n 8 python scripts/cm_train.py --preset bedroom256_ct --data_dir data/bedroom256 \
    --teacher_model_path models/edm_bedroom256_ema.pt

# Cat
mpiexec -n 8 python scripts/cm_train.py --preset cat256_ct --data_dir data/cat256 \
    --teacher_model_path models/edm_cat256_ema.pt

####################################################################################################
# Progressive distillation (PD)
####################################################################################################

# ImageNet, l2
mpiexec -n 8 python scripts/cm_train.py --preset imagenet64_pd_l2 --data_dir data/imagenet64 \
    --teacher_model_path models/edm_imagenet64_ema.pt

# ImageNet, LPIPS
mpiexec -n 8 python scripts/cm_train.py --preset imagenet64_pd_lpips --data_dir data/imagenet64 \
    --teacher_model_path models/edm_imagenet64_ema.pt

# Bedroom, l2
mpiexec -n 8 python scripts/cm_train.py --preset bedroom256_pd_l2 --data_dir data/bedroom256 \
    --teacher_model_path models/edm_bedroom256_ema.pt

# Bedroom, LPIPS
mpiexec -n 8 python scripts/cm_train.py --preset bedroom256_pd_lpips --data_dir data/bedroom256 \
    --teacher_model_path models/edm_bedroom256_ema.pt

# Cat, l2
mpiexec -n 8 python scripts/cm_train.py --preset cat256_pd_l2 --data_dir data/cat256 \
    --teacher_model_path models/edm_cat256_ema.pt

# Cat, LPIPS
mpiexec -n 8 python scripts/cm_train.py --preset cat256_pd_lpips --data_dir data/cat256 \
    --teacher_model_path models/edm_cat256_ema.pt

# Samples with one step; --steps 2 with a checkpoint of the two-step stage
mpiexec -n 8 python scripts/image_sample.py --preset imagenet64_pd_l2 --model_path models/pd_imagenet64_l2.pt

####################################################################################################
# One-step samples
####################################################################################################

# ImageNet
mpiexec -n 8 python scripts/image_sample.py --batch_size 256 --training_mode consistency_distillation \
    --sampler onestep --model_path models/cd_imagenet64_lpips.pt --attention_resolutions 32,16,8 \
    --class_cond True --use_scale_shift_norm True --dropout 0.0 --image_size 64 --num_channels 192 \
    --num_head_channels 64 --num_res_blocks 3 --num_samples 500 --resblock_updown True --use_fp16 True \
    --weight_schedule uniform
mpiexec -n 8 python scripts/image_sample.py --preset imagenet64_cd_lpips \
    --model_path models/cd_imagenet64_lpips.pt

# Bedroom
mpiexec -n 8 python scripts/image_sample.py --batch_size 32 --generator determ-indiv \
    --training_mode consistency_distillation --sampler onestep --model_path models/ct_bedroom256.pt \
    --attention_resolutions 32,16,8 --class_cond False --use_scale_shift_norm False --dropout 0.0 \
    --image_size 256 --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --num_samples 100 \
    --resblock_updown True --use_fp16 True --weight_schedule uniform
mpiexec -n 8 python scripts/image_sample.py --preset bedroom256_ct --generator determ-indiv --num_samples 100 \
    --model_path models/ct_bedroom256.pt

# Cat
mpiexec -n 8 python scripts/image_sample.py --preset cat256_cd_lpips --model_path models/cd_cat256_lpips.pt

####################################################################################################
# Search of the second time point
####################################################################################################

# ImageNet, distilled with LPIPS
mpiexec -n 8 python scripts/ternary_search.py --begin 0 --end 39 --steps 40 --generator determ \
    --ref_batch references/imagenet64.npz --batch_size 256 --model_path models/cd_imagenet64_lpips.pt \
    --attention_resolutions 32,16,8 --class_cond True --use_scale_shift_norm True --dropout 0.0 --image_size 64 \
    --num_channels 192 --num_head_channels 64 --num_res_blocks 3 --num_samples 50000 --resblock_updown True \
    --use_fp16 True --weight_schedule uniform
mpiexec -n 8 python scripts/ternary_search.py --preset imagenet64_cd_lpips --generator determ \
    --model_path models/cd_imagenet64_lpips.pt --ref_batch references/imagenet64.npz

# ImageNet, trained in isolation
mpiexec -n 8 python scripts/ternary_search.py --begin 0 --end 200 --steps 201 --generator determ \
    --ref_batch references/imagenet64.npz --batch_size 256 --model_path models/ct_imagenet64.pt \
    --attention_resolutions 32,16,8 --class_cond True --use_scale_shift_norm True --dropout 0.0 --image_size 64 \
    --num_channels 192 --num_head_channels 64 --num_res_blocks 3 --num_samples 50000 --resblock_updown True \
    --use_fp16 True --weight_schedule uniform
mpiexec -n 8 python scripts/ternary_search.py --preset imagenet64_ct --generator determ \
    --model_path models/ct_imagenet64.pt --ref_batch references/imagenet64.npz

# Bedroom, distilled with LPIPS
mpiexec -n 8 python scripts/ternary_search.py --begin 0 --end 39 --steps 40 --generator determ-indiv \
    --ref_batch references/bedroom256.npz --batch_size 32 --model_path models/cd_bedroom256_lpips.pt \
    --attention_resolutions 32,16,8 --class_cond False --use_scale_shift_norm False --dropout 0.0 \
    --image_size 256 --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --num_samples 50000 \
    --resblock_updown True --use_fp16 True --weight_schedule uniform
mpiexec -n 8 python scripts/ternary_search.py --preset bedroom256_cd_lpips --generator determ-indiv \
    --model_path models/cd_bedroom256_lpips.pt --ref_batch references/bedroom256.npz

# Bedroom, trained in isolation
mpiexec -n 8 python scripts/ternary_search.py --begin 0 --end 150 --steps 151 --generator determ-indiv \
    --ref_batch references/bedroom256.npz --batch_size 32 --model_path models/ct_bedroom256.pt \
    --attention_resolutions 32,16,8 --class_cond False --use_scale_shift_norm False --dropout 0.0 \
    --image_size 256 --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --num_samples 50000 \
    --resblock_updown True --use_fp16 True --weight_schedule uniform
mpiexec -n 8 python scripts/ternary_search.py --preset bedroom256_ct --generator determ-indiv \
    --model_path models/ct_bedroom256.pt --ref_batch references/bedroom256.npz

# Cat, distilled with LPIPS
mpiexec -n 8 python scripts/ternary_search.py --preset cat256_cd_lpips --model_path models/cd_cat256_lpips.pt \
    --ref_batch references/cat256.npz

####################################################################################################
# Two-step samples
####################################################################################################

# ImageNet, distilled with LPIPS
mpiexec -n 8 python scripts/image_sample.py --batch_size 256 --training_mode consistency_distillation \
    --sampler multistep --ts 0,22,39 --steps 40 --model_path models/cd_imagenet64_lpips.pt \
    --attention_resolutions 32,16,8 --class_cond True --use_scale_shift_norm True --dropout 0.0 --image_size 64 \
    --num_channels 192 --num_head_channels 64 --num_res_blocks 3 --num_samples 500 --resblock_updown True \
    --use_fp16 True --weight_schedule uniform
mpiexec -n 8 python scripts/image_sample.py --preset imagenet64_cd_lpips --sampler multistep \
    --model_path models/cd_imagenet64_lpips.pt

# ImageNet, distilled with l2
mpiexec -n 8 python scripts/image_sample.py --batch_size 256 --training_mode consistency_distillation \
    --sampler multistep --ts 0,22,39 --steps 40 --model_path models/cd_imagenet64_l2.pt \
    --attention_resolutions 32,16,8 --class_cond True --use_scale_shift_norm True --dropout 0.0 --image_size 64 \
    --num_channels 192 --num_head_channels 64 --num_res_blocks 3 --num_samples 500 --resblock_updown True \
    --use_fp16 True --weight_schedule uniform
mpiexec -n 8 python scripts/image_sample.py --preset imagenet64_cd_l2 --sampler multistep \
    --model_path models/cd_imagenet64_l2.pt

# ImageNet, trained in isolation
mpiexec -n 8 python scripts/image_sample.py --batch_size 256 --training_mode consistency_training \
    --sampler multistep --ts 0,106,200 --steps 201 --model_path models/ct_imagenet64.pt \
    --attention_resolutions 32,16,8 --class_cond True --use_scale_shift_norm True --dropout 0.0 --image_size 64 \
    --num_channels 192 --num_head_channels 64 --num_res_blocks 3 --num_samples 500 --resblock_updown True \
    --use_fp16 True --weight_schedule uniform
mpiexec -n 8 python scripts/image_sample.py --preset imagenet64_ct --sampler multistep \
    --model_path models/ct_imagenet64.pt

# Bedroom, distilled with LPIPS
mpiexec -n 8 python scripts/image_sample.py --batch_size 32 --training_mode consistency_distillation \
    --sampler multistep --ts 0,17,39 --steps 40 --model_path models/cd_bedroom256_lpips.pt \
    --attention_resolutions 32,16,8 --class_cond False --use_scale_shift_norm False --dropout 0.0 \
    --image_size 256 --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --num_samples 500 \
    --resblock_updown True --use_fp16 True --weight_schedule uniform
mpiexec -n 8 python scripts/image_sample.py --preset bedroom256_cd_lpips --sampler multistep \
    --model_path models/cd_bedroom256_lpips.pt

# Bedroom, distilled with l2
mpiexec -n 8 python scripts/image_sample.py --batch_size 32 --training_mode consistency_distillation \
    --sampler multistep --ts 0,18,39 --steps 40 --model_path models/cd_bedroom256_l2.pt \
    --attention_resolutions 32,16,8 --class_cond False --use_scale_shift_norm False --dropout 0.0 \
    --image_size 256 --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --num_samples 500 \
    --resblock_updown True --use_fp16 True --weight_schedule uniform
mpiexec -n 8 python scripts/image_sample.py --preset bedroom256_cd_l2 --sampler multistep \
    --model_path models/cd_bedroom256_l2.pt

# Bedroom, trained in isolation
mpiexec -n 8 python scripts/image_sample.py --batch_size 32 --training_mode consistency_distillation \
    --sampler multistep --ts 0,67,150 --steps 151 --model_path models/ct_bedroom256.pt \
    --attention_resolutions 32,16,8 --class_cond False --use_scale_shift_norm False --dropout 0.0 \
    --image_size 256 --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --num_samples 500 \
    --resblock_updown True --use_fp16 True --weight_schedule uniform
mpiexec -n 8 python scripts/image_sample.py --preset bedroom256_ct --sampler multistep \
    --model_path models/ct_bedroom256.pt

# Cat, trained in isolation
mpiexec -n 8 python scripts/image_sample.py --batch_size 32 --training_mode consistency_distillation \
    --sampler multistep --ts 0,62,150 --steps 151 --model_path models/ct_cat256.pt \
    --attention_resolutions 32,16,8 --class_cond False --use_scale_shift_norm False --dropout 0.0 \
    --image_size 256 --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --num_samples 500 \
    --resblock_updown True --use_fp16 True --weight_schedule uniform
mpiexec -n 8 python scripts/image_sample.py --preset cat256_ct --sampler multistep \
    --model_path models/ct_cat256.pt
