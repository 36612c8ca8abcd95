#!/bin/bash
# A-CLIP, ViT-B/16, YFCC15M: 64 ranks x 64.
#   sbatch slurm/aclip_yfcc15m_vitb16.sh
#SBATCH --job-name=aclip_yfcc15m_vitb16
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

# ---- site settings: edit here, or set the same names in the environment, or in slurm/site.sh for all templates -------
#   account and partition: SBATCH_ACCOUNT, SBATCH_PARTITION, or take one '#' away here
##SBATCH --account=team
##SBATCH --partition=gpu
export VENV=${VENV:-}                # virtual environment with declip-trainer installed
export CONTAINER=${CONTAINER:-}      # or a container image, where the site uses pyxis
export DATA=${DATA:-}                # shards, e.g. '/data/yfcc15m/{00000..01538}.tar'; empty: as in the recipe
# ----------------------------------------------------------------------------------------------------------------------

export RECIPE=${RECIPE:-aclip_yfcc15m_vitb16} DS_CONFIG=${DS_CONFIG:-ds_configs/zero1.json}
exec bash "${DECLIP_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh" "$@"
