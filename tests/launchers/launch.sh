# ferrotune's own launcher.
exec "$FERROTUNE" launch --nproc 2 -- "$@"
