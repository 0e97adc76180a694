# What the guest does when its modules are loaded. From the kernel's command line: round,
# counted from 1; jobs, the last job of fio that the script knows of. Set before: kills,
# after which a round only reads; slots and slot_size, of fio's partition; remembered, how
# many jobs fio verifies.

PATH=/bin:/usr/bin:/usr/sbin
dmesg -n 1
# A line is whole if it ends with a point: the kill may cut it.
say() { echo "guest: $* ."; }
digest() { sha256sum | cut -c -16; }
problems() { dmesg | grep -iE 'i/o error|ext4-fs (error|warning)|buffer error|jbd2: '; }

wait=0
while [ ! -b /dev/vda2 ] && [ $wait -lt 100 ]; do sleep 0.1; wait=$((wait + 1)); done

if [ $round = 1 ]; then
    # Without discarding: what the base has there lies compressed under every new block.
    mkfs.ext4 -q -b 4096 -J size=4 -E nodiscard /dev/vda1 || say "no file system"
fi
mount -t ext4 -o discard /dev/vda1 /mnt || say "no mount"
say "recoveries $(dmesg | grep -c 'EXT4-fs (vda1): recovery complete')"
umount /mnt
e2fsck -fn /dev/vda1 >/tmp/e2fsck 2>&1
say "e2fsck $?"
grep -vE '^Pass |^e2fsck ' /tmp/e2fsck
mount -t ext4 -o discard /dev/vda1 /mnt || say "no mount"
cd /mnt
[ $round = 1 ] || sha256sum synced-* | sed -E 's/^(.{16})[^ ]*  (.*)$/guest: file \2 \1 ./'

# Job n writes slot n and trims the one that is farthest from it.
slot() { echo $(($1 % slots * slot_size)); }
job() {
    echo "--thread --filename=/dev/vda2 --ioengine=psync --direct=1 --verify_state_save=0 --size=$slot_size --minimal \
        --name=write --rw=randwrite --bsrange=4k-64k --offset=$(slot $1) --randseed=$1 \
        --verify=crc32c --verify_interval=4k"
}
slot_digest() {
    dd if=/dev/vda2 bs=$slot_size skip=$(($1 % slots)) count=1 iflag=direct 2>/dev/null | digest
}
n=$jobs
while [ $n -gt 0 ] && [ $n -gt $((jobs - remembered)) ]; do
    fio $(job $n) --verify_only >/tmp/fio 2>&1
    say "verified $n $? $(slot_digest $n)"
    n=$((n - 1))
done
say "problems $(problems | wc -l)"
problems
if [ $round -gt $kills ]; then
    cd /
    umount /mnt && say "end"
    reboot -f
fi

files() {
    i=1
    while :; do
        name=synced-$round-$i
        dd if=/dev/urandom of=/tmp/content bs=4k count=$((1 + (round * 5 + i * 7) % 40)) 2>/dev/null
        case $((i % 3)) in
            0) cp /tmp/content temporary && mv temporary $name && sync;;
            1) dd if=/tmp/content of=$name bs=64k conv=fsync 2>/dev/null;;
            2) cp /tmp/content $name && sync;;
        esac && say "synced $name $(digest </tmp/content)"
        # What nobody waits for, and what is freed again.
        dd if=/dev/urandom of=unsynced-$((i % 2)) bs=4k seek=$((i * 13 % 64)) count=16 conv=notrunc 2>/dev/null
        [ $((i % 4)) != 3 ] || rm unsynced-0
        i=$((i + 1))
    done
}
files &
n=$jobs
while :; do
    n=$((n + 1))
    fio $(job $n) --do_verify=0 --end_fsync=1 --name=trim --rw=randtrim --bsrange=4k-128k \
        --offset=$(slot $((n + slots / 2))) --randseed=$n >/tmp/fio 2>&1
    code=$?
    say "fio $n $code $(slot_digest $n)"
    [ $code = 0 ] || cat /tmp/fio
done
