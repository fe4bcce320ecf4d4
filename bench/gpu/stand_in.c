/* A libcuda.so.1 for a machine without a GPU: it answers as an H200's driver and launches nothing.

   Triton links its launchers against it, loads kernels into it and launches them, as on a GPU; what
   the real driver would refuse is counted and named. Of a kernel's registers, which it finds in the
   machine code, follows how many threads a block may have. */
#include <cuda.h>
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SHARED 232448
#define REGISTERS 65536

struct kernel {
  char name[256];
  int registers;
};

static long launches, refused;
static char reason[512];

long stand_in_launches(void) { return launches; }
long stand_in_refused(void) { return refused; }
const char *stand_in_reason(void) { return reason; }

/* What Triton asks on its way: nothing is done, or one answer is given. */
#define DONE(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
#define GIVES(name, type, result, ...) \
  CUresult name(type *found, ##__VA_ARGS__) { *found = (type)(result); return CUDA_SUCCESS; }

DONE(cuInit, unsigned flags)
DONE(cuCtxSetCurrent, CUcontext context)
DONE(cuCtxSetLimit, CUlimit limit, size_t value)
DONE(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
DONE(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
GIVES(cuDriverGetVersion, int, 13000)
GIVES(cuDeviceGet, CUdevice, 0, int ordinal)
GIVES(cuDeviceGetCount, int, 1)
GIVES(cuDevicePrimaryCtxRetain, CUcontext, 1, CUdevice device)
GIVES(cuCtxGetCurrent, CUcontext, 1)
GIVES(cuCtxGetLimit, size_t, 0, CUlimit limit)
GIVES(cuOccupancyMaxActiveClusters, int, 1, CUfunction function, const CUlaunchConfig *config)

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = reason[0] ? reason : "refused by the stand-in";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  default: *value = 1000;
  }
  return CUDA_SUCCESS;
}

/* Memory of the host stands for the GPU's; nobody reads it. */
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

/* A module is the address of its machine code; its kernel is asked for while Triton holds that. */
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

/* Registers of a kernel: the attribute REGCOUNT (0x2f) of the section .nv.info, whose entries are a
   format, an attribute, and a size where the format is 4. Triton makes one kernel a module. */
static int registers_of(const char *image) {
  const Elf64_Ehdr *head = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + head->e_shoff);
  const char *names = image + sections[head->e_shstrndx].sh_offset;
  for (int i = 0; i < head->e_shnum; i++) {
    if (strcmp(names + sections[i].sh_name, ".nv.info")) continue;
    const unsigned char *at = (const unsigned char *)image + sections[i].sh_offset;
    const unsigned char *end = at + sections[i].sh_size;
    for (; at + 4 <= end; at += 4 + (at[0] == 4 ? at[2] + 256 * at[3] : 0))
      if (at[0] == 4 && at[1] == 0x2f) return at[8] + 256 * at[9];
  }
  return 0;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  struct kernel *kernel = calloc(1, sizeof *kernel);
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  kernel->registers = registers_of((const char *)module);
  *function = (CUfunction)kernel;
  return kernel->registers ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  int registers = (((struct kernel *)function)->registers + 7) / 8 * 8;
  *value = 0;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) {
    int threads = REGISTERS / registers / 32 * 32;
    *value = threads < 1024 ? threads : 1024;
  } else if (attribute == CU_FUNC_ATTRIBUTE_NUM_REGS)
    *value = registers;
  return CUDA_SUCCESS;
}

DONE(cuTensorMapEncodeTiled, CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
     void *address, const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
     const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
     CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill)

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments,
                          void **extra) {
  struct kernel *kernel = (struct kernel *)function;
  int most;
  cuFuncGetAttribute(&most, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function);
  launches++;
  if (!c->gridDimX || !c->gridDimY || !c->gridDimZ || c->gridDimY > 65535 || c->gridDimZ > 65535 ||
      (int)c->blockDimX > most || c->sharedMemBytes > SHARED) {
    refused++;
    snprintf(reason, sizeof reason, "%s: grid %u x %u x %u, %u threads of %d, %u bytes shared",
             kernel->name, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, most,
             c->sharedMemBytes);
    return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
