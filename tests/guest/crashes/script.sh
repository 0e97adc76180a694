# Runs the machines, in the directory where the files are. Set before: kills, how many are
# killed; options, for every kernel.

jobs=0
round=1
while [ $round -le $((kills + 1)) ]; do
    # Emptied here, not by the machine's process: what is waited for below must not be found
    # in the log of the round before.
    : >log
    ./blockhouse run --kernel vmlinuz --initrd initrd \
        --cmdline "console=ttyS0 quiet $options round=$round jobs=$jobs" \
        --disk "file=images/overlay.qcow2,format=qcow2,allow=$PWD/golden" >>log 2>&1 &
    machine=$!
    if [ $round -le $kills ]; then
        # Now this much has to be on the disk, now that, so that the kills hit different work.
        files=$((1 + round % 4))
        written=$((round % 2))
        while [ -e /proc/$machine/exe ]; do
            [ "$(grep -c '^guest: synced .* \.' log)" -ge $files ] &&
                [ "$(grep -c '^guest: fio .* \.' log)" -ge $written ] && break
            sleep 0.1
        done
        sleep 0.$((round * 7 % 10))
        kill -9 $machine
    fi
    wait $machine
    echo "round $round: exit $?"
    # The last line may have no end.
    cat log
    echo
    job=$(sed -n 's/^guest: fio \([0-9]*\) .* \..*/\1/p' log | tail -n 1)
    jobs=${job:-$jobs}
    ln images/overlay.qcow2 images/round-$round.qcow2
    tar -cf - images/round-$round.qcow2 >&3
    rm images/round-$round.qcow2
    round=$((round + 1))
done
tar -cf - golden/base.qcow2 >&3
echo "script: done"
