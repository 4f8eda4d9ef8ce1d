/* Makes the CPU look as if it had no AMX, as most have none: onnxruntime asks the kernel for leave to use it, and here
 * the kernel says no. torch is told by ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 instead.
 *   cc -shared -fPIC -o no_amx.so benchmarks/no_amx.c
 *   python benchmarks/cpu.py --without-amx ./no_amx.so ...
 */
#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>

#define ARCH_REQ_XCOMP_PERM 0x1023

long syscall(long number, ...) {
    va_list arguments;
    va_start(arguments, number);
    long a = va_arg(arguments, long), b = va_arg(arguments, long), c = va_arg(arguments, long);
    register long d __asm__("r10") = va_arg(arguments, long);
    register long e __asm__("r8") = va_arg(arguments, long);
    register long f __asm__("r9") = va_arg(arguments, long);
    va_end(arguments);
    long result;
    if (number == SYS_arch_prctl && a == ARCH_REQ_XCOMP_PERM) {
        errno = EINVAL;
        return -1;
    }
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(d), "r"(e), "r"(f)
                     : "rcx", "r11", "memory");
    if (result < 0 && result > -4096) {
        errno = -result;
        return -1;
    }
    return result;
}
