/* A libcuda.so.1 that stands in for the driver of an H200 and launches nothing.

   Triton loads its kernels into it and launches them as on a GPU. What an H200 would refuse is an
   error here too: a block of more threads than its registers allow, too much shared memory, a grid
   beyond the limits. A pointer to the host's memory is taken for one to the GPU's. */

#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SHARED = 227 * 1024, REGISTERS = 65536, THREADS = 1024, GRID_YZ = 65535 };

typedef struct {
  unsigned registers, spilled;
  char name[200];
} Kernel;

static long launches, refused;
static char reason[400];

long stand_in_launches(void) { return launches; }
long stand_in_refused(void) { return refused; }
const char *stand_in_reason(void) { return reason; }

/* What Triton asks on its way. */

#define DONE(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
#define GIVES(name, type, result, ...) \
  CUresult name(type *found, ##__VA_ARGS__) { *found = (type)(result); return CUDA_SUCCESS; }

DONE(cuInit, unsigned flags)
DONE(cuCtxSetCurrent, CUcontext context)
DONE(cuCtxSetLimit, CUlimit limit, size_t value)
DONE(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
GIVES(cuDriverGetVersion, int, 13000)
GIVES(cuDeviceGet, CUdevice, 0, int ordinal)
GIVES(cuDeviceGetCount, int, 1)
GIVES(cuDevicePrimaryCtxRetain, CUcontext, 1, CUdevice device)
GIVES(cuCtxGetCurrent, CUcontext, 1)
GIVES(cuCtxGetLimit, size_t, 0, CUlimit limit)
GIVES(cuOccupancyMaxActiveClusters, int, 1, CUfunction function, const CUlaunchConfig *config)

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = reason;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1; /* clocks and widths, which nothing here depends on */
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *found, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)found = pointer;
  return CUDA_SUCCESS;
}

/* Refuses what has no number of these, or more than there may be. */
static CUresult within(const Kernel *kernel, const char *what, long number, long most) {
  if (0 < number && number <= most) return CUDA_SUCCESS;
  refused++;
  snprintf(reason, sizeof reason, "%s: %ld %s of 1 to %ld", kernel->name, number, what, most);
  return CUDA_ERROR_INVALID_VALUE;
}

/* Kernels. A module is its machine code, an ELF file, which Triton keeps. */

GIVES(cuModuleLoadData, CUmodule, image, const void *image)

/* The word that belongs to symbol number `symbol` by an attribute in the section .nv.info. */
static unsigned find(const uint8_t *at, const uint8_t *end, int attribute, unsigned symbol) {
  while (at + 4 <= end) {
    unsigned size = at[0] == 4 ? at[2] | at[3] << 8 : 0, words[2];
    if (at[1] == attribute && size == sizeof words) {
      memcpy(words, at + 4, sizeof words);
      if (words[0] == symbol) return words[1];
    }
    at += 4 + size;
  }
  return 0;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  enum { REGCOUNT = 0x2f, FRAME_SIZE = 0x11 };
  const uint8_t *image = (const uint8_t *)module;
  const Elf64_Ehdr *head = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + head->e_shoff), *info = NULL;
  const char *names = (const char *)image + sections[head->e_shstrndx].sh_offset;
  Kernel *kernel = calloc(1, sizeof *kernel);
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  *function = (CUfunction)kernel;
  for (int i = 0; i < head->e_shnum; i++)
    if (!strcmp(names + sections[i].sh_name, ".nv.info")) info = &sections[i];
  for (int i = 0; info && i < head->e_shnum; i++) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const Elf64_Sym *symbols = (const Elf64_Sym *)(image + sections[i].sh_offset);
    const char *strings = (const char *)image + sections[sections[i].sh_link].sh_offset;
    const uint8_t *begin = image + info->sh_offset, *end = begin + info->sh_size;
    for (unsigned s = 0; s < sections[i].sh_size / sizeof *symbols; s++)
      if (ELF64_ST_TYPE(symbols[s].st_info) == STT_FUNC &&
          !strcmp(strings + symbols[s].st_name, name)) {
        kernel->registers = find(begin, end, REGCOUNT, s);
        kernel->spilled = find(begin, end, FRAME_SIZE, s);
      }
  }
  return within(kernel, "registers", kernel->registers, 255);
}

/* Registers come to a warp by 256. */
static int threads_of(const Kernel *kernel) {
  int threads = REGISTERS / ((kernel->registers + 7) / 8 * 8) / 32 * 32;
  return threads < THREADS ? threads : THREADS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  const Kernel *kernel = (const Kernel *)function;
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = threads_of(kernel); break;
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = kernel->registers; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = kernel->spilled; break;
  default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  return within((const Kernel *)function, "bytes shared", value, SHARED);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **extra) {
  const Kernel *kernel = (const Kernel *)f;
  long threads = (long)c->blockDimX * c->blockDimY * c->blockDimZ;
  CUresult error = within(kernel, "threads", threads, threads_of(kernel));
  launches++;
  if (!error) error = within(kernel, "bytes shared and one", 1L + c->sharedMemBytes, 1L + SHARED);
  if (!error) error = within(kernel, "programs", c->gridDimX, INT32_MAX);
  if (!error) error = within(kernel, "programs on the second axis", c->gridDimY, GRID_YZ);
  if (!error) error = within(kernel, "programs on the third axis", c->gridDimZ, GRID_YZ);
  return error;
}
