# MPI for the values too: a binary with the feature `mpi`, built here (Debian: libopenmpi-dev, libclang-dev).
command -v mpicc >/dev/null && command -v mpirun >/dev/null || { echo "mpicc or mpirun is not installed"; exit 77; }
cargo build -q --features mpi --target-dir target/mpi --bin ferrotune >&2 ||
    { echo "the feature mpi does not build here (libclang?)"; exit 77; }
# On one machine no remote shell is needed, but Open MPI asks for one all the same.
export OMPI_MCA_plm_rsh_agent=/bin/false
port=$((20000 + RANDOM % 10000))
exec mpirun --allow-run-as-root --oversubscribe --bind-to none -np 2 -x FERROTUNE_MASTER_PORT=$port \
    target/mpi/debug/ferrotune "$@" --ddp_backend mpi
