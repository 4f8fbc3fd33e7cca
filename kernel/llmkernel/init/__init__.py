"""Init: parent, reaper and fork server of every local process.  It has no policy.

`loop` is the process; `home` claims the folder, `launch` is what happens in a child before its
program, `children` the table of processes, `kernels` which kernel rules, `image` what forked
children share, `guard` the process that cleans up after a killed init.
"""
