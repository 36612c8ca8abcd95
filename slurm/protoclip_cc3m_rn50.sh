#!/bin/bash
# ProtoCLIP, ResNet-50, CC3M: 8 ranks x 64.
#   sbatch slurm/protoclip_cc3m_rn50.sh
#SBATCH --job-name=protoclip_cc3m_rn50
#SBATCH --nodes=1
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
export DATA=${DATA:-}                # shards, e.g. '/data/cc3m/{00000..00331}.tar'; empty: as in the recipe
# ----------------------------------------------------------------------------------------------------------------------

export RECIPE=${RECIPE:-protoclip_cc3m_rn50} DS_CONFIG=${DS_CONFIG:-ds_configs/zero1.json}
exec bash "${DECLIP_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh" "$@"
